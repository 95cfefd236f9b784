"""The files of a data set: built in hiding, published when whole, recognised when asked for again."""

import argparse
import contextlib
import fcntl
import hashlib
import json
import os
import shutil
from pathlib import Path

import numpy as np

from hmoe_megatron.data_prep.encoding import Bad
from hmoe_megatron.files import sha256_file, write_whole

SCHEMA = 1


class Output:
    """The files of one run, built in a hidden folder beside their final names; `publish` renames them.

    The folder is locked while a run lives, so a second run on the same prefix is refused, and what a killed
    run left is recognised and removed.
    """

    def __init__(self, prefix: str, keys: list[str], dtype: type):
        from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

        self.prefix = Path(prefix)
        self.folder = self.prefix.with_name(f".{self.prefix.name}.partial")
        self.folder.mkdir(exist_ok=True)
        self.lock = os.open(self.folder, os.O_RDONLY)
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self.lock)
            raise ValueError(
                f"--output-prefix {prefix}: another run is writing it; wait for it or choose another prefix"
            ) from None
        for stale in self.folder.iterdir():
            stale.unlink()
        self.names = [data_set_name(self.prefix, key).name for key in keys]
        self.builders = [IndexedDatasetBuilder(str(self.folder / f"{name}.bin"), dtype=dtype) for name in self.names]
        self.quarantine, self.quarantine_name = None, f"{self.prefix.name}.quarantine.jsonl"

    def add(self, ids_of_keys: list[np.ndarray]) -> None:
        for builder, ids in zip(self.builders, ids_of_keys, strict=True):
            builder.add_document(ids, [len(ids)])

    def add_to_quarantine(self, bad: Bad) -> None:
        if self.quarantine is None:
            self.quarantine = (self.folder / self.quarantine_name).open("w", encoding="ascii")
        self.quarantine.write(json.dumps(bad._asdict()) + "\n")

    def publish(self, sidecars: list[dict]) -> None:
        """Adds hashes to the sidecars and gives every file its final name, the .idx files last."""
        if self.quarantine:
            self.quarantine.close()
        else:  # one that is there belongs to an older run
            self.prefix.with_name(self.quarantine_name).unlink(missing_ok=True)
        for name, builder, sidecar in zip(self.names, self.builders, sidecars, strict=True):
            builder.finalize(str(self.folder / f"{name}.idx"))
            built = [self.folder / f"{name}{suffix}" for suffix in (".bin", ".idx")]
            sidecar["outputs"] = {p.name: {"bytes": p.stat().st_size, "sha256": sha256_file(p)} for p in built}
            write_whole(self.folder / f"{name}.json", (json.dumps(sidecar, indent=1) + "\n").encode())
        for file in sorted(self.folder.iterdir(), key=lambda file: (file.suffix == ".idx", file.name)):
            with open(file, "rb") as handle:
                os.fsync(handle.fileno())
            os.replace(file, self.prefix.with_name(file.name))

    def close(self) -> None:
        """Removes what was not published."""
        quarantine = [self.quarantine] if self.quarantine else []
        for file in [builder.data_file for builder in self.builders] + quarantine:
            with contextlib.suppress(OSError):  # the disk may be full
                file.close()
        shutil.rmtree(self.folder, ignore_errors=True)
        os.close(self.lock)


def data_set_name(prefix: str | Path, key: str) -> Path:
    """Megatron's own name for the documents of one key; what --data-path takes."""
    prefix = Path(prefix)
    return prefix.with_name(f"{prefix.name}_{key}_document")


def fingerprint(request: dict) -> str:
    return hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()


def is_done(args: argparse.Namespace, request: dict) -> bool:
    """Whether the data sets are there, whole, made by this request. Raises ValueError if others are."""
    names = [data_set_name(args.output_prefix, key) for key in args.json_keys]
    existing = [name for name in names if Path(f"{name}.idx").exists()]
    for name in existing:
        try:
            sidecar = json.loads(Path(f"{name}.json").read_text())
            is_same = sidecar["schema"] == SCHEMA and sidecar["fingerprint"] == fingerprint(request)
            files = [name.with_name(f"{name.name}{suffix}") for suffix in (".bin", ".idx")]
            is_same &= all(sha256_file(file) == sidecar["outputs"][file.name]["sha256"] for file in files)
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            is_same = False
        if not is_same:
            raise ValueError(
                f"--output-prefix {args.output_prefix}: {name}.idx was made from other input or flags, or is "
                "damaged; remove it or choose another prefix"
            )
    return len(existing) == len(names)
