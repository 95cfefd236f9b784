"""The manifest of a checkpoint: what it is of, and the SHA-256 of its files. No torch.

It is written last, so a checkpoint without one is not complete. Its hashes find damage, not malice: who can alter the
files can alter the manifest, which is why `reader` trusts neither.
"""

import os
import re
import stat
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from hmoe_megatron.checkpoint.directory import MANIFEST_FILE, MAX_ITERATION
from hmoe_megatron.exits import OTHER_CHECKPOINT, CheckpointRefused
from hmoe_megatron.files import atomic_write, read_text, sha256_file
from hmoe_megatron.untrusted import canonical, checksum, parsed

SCHEMA = 1
MAX_BYTES = 64 << 20
MAX_DAMAGES = 8  # named in a message
_FILE_NAME = re.compile(r"[A-Za-z0-9_.\-]{1,200}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
# Megatron reads this file of older checkpoints, where it is there, instead of what the shards hold.
LEGACY_FILE = "common.pt"
_REMEDY = f"{OTHER_CHECKPOINT}, or load it unchecked with --hmoe-skip-integrity"
_FIELDS = {"schema": int, "iteration": int, "settings": dict, "layout": dict, "versions": dict, "files": dict}


@dataclass(frozen=True)
class FileRecord:
    """Of one file of a checkpoint."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """settings: name -> value of what `settings.model_settings` collects; layout and versions are for people."""

    iteration: int
    settings: dict
    layout: dict
    versions: dict
    files: dict[str, FileRecord]

    def save(self, folder: Path) -> None:
        """Write the manifest of the checkpoint in `folder`."""
        files = {name: [record.bytes, record.sha256] for name, record in sorted(self.files.items())}
        body = {
            "schema": SCHEMA,
            "iteration": self.iteration,
            "settings": self.settings,
            "layout": self.layout,
            "versions": self.versions,
            "files": files,
        }
        atomic_write(Path(folder) / MANIFEST_FILE, (canonical(body | {"sha256": checksum(body)}) + "\n").encode())


def load_manifest(folder: Path) -> Manifest:
    """Manifest of the checkpoint in `folder`, untrusted. Raises CheckpointRefused with file, reason and remedy."""
    path = Path(folder) / MANIFEST_FILE
    if not path.exists():
        raise CheckpointRefused(f"{path} is missing: not a complete checkpoint of pretrain_hmoe.py; {_REMEDY}")
    try:
        body = parsed("manifest", read_text(path, MAX_BYTES), MAX_BYTES)
        _check(body)
    except ValueError as error:
        raise CheckpointRefused(f"{path}: {error}; {_REMEDY}") from None
    files = {name: FileRecord(*record) for name, record in body["files"].items()}
    return Manifest(body["iteration"], body["settings"], body["layout"], body["versions"], files)


def _check(body) -> None:
    if type(body) is not dict or body.get("schema") != SCHEMA:
        raise ValueError(f"not a manifest of schema {SCHEMA}")
    content = {name: value for name, value in body.items() if name != "sha256"}
    if set(content) != set(_FIELDS) or any(type(content[name]) is not kind for name, kind in _FIELDS.items()):
        raise ValueError(f"its fields are not {', '.join(_FIELDS)} of the right types")
    if body.get("sha256") != checksum(content):
        raise ValueError("altered after it was written (sha256 does not match)")
    if not 0 < body["iteration"] <= MAX_ITERATION:
        raise ValueError(f"iteration {body['iteration']!r:.40} is out of range")
    for name, record in body["files"].items():
        if not _FILE_NAME.fullmatch(name) or name in (".", ".."):
            raise ValueError(f"{name!r:.80} is no plain file name")
        if not (
            type(record) is list
            and len(record) == 2
            and type(record[0]) is int
            and type(record[1]) is str
            and _SHA256.fullmatch(record[1])
        ):
            raise ValueError(f"files: {name}: not [bytes, sha256]")


def record_files(folder: Path, names: Iterable[str]) -> dict[str, FileRecord]:
    """Size and hash of these files."""
    return {name: FileRecord((Path(folder) / name).stat().st_size, sha256_file(Path(folder) / name)) for name in names}


def share_of(files: dict[str, FileRecord], rank: int, ranks: int) -> dict[str, FileRecord]:
    """The files that this rank checks: dealt by falling size, so that shares are alike; every file has one rank."""
    dealt = sorted(files.items(), key=lambda item: (-item[1].bytes, item[0]))
    return dict(dealt[rank::ranks])


def unlisted_files(folder: Path, files: dict[str, FileRecord]) -> list[str]:
    """What would be loaded from this directory and is not in its manifest, a phrase each."""
    if LEGACY_FILE in files or not os.path.lexists(Path(folder) / LEGACY_FILE):
        return []
    return [f"{LEGACY_FILE} was added to it"]


def damaged_files(folder: Path, files: dict[str, FileRecord]) -> list[str]:
    """What is wrong with these files, a phrase each: missing, no regular file, shorter, longer, altered."""
    found = []
    for name, record in files.items():
        path = Path(folder) / name
        try:
            status = path.lstat()
            if not stat.S_ISREG(status.st_mode):
                found.append(f"{name} is a {'symbolic link' if stat.S_ISLNK(status.st_mode) else 'special file'}")
            elif status.st_size != record.bytes:
                found.append(f"{name} has {status.st_size} bytes, {record.bytes} were saved")
            elif sha256_file(path) != record.sha256:
                found.append(f"{name} is altered (SHA-256 does not match)")
        except OSError as error:
            found.append(f"{name}: {error.strerror}")
    return found
