"""From finished shards to the data set: joined, described by a sidecar, hashed, and given its name when whole."""

import contextlib
import hashlib
import importlib.metadata
import json
import os
import shutil
import sys
from collections import Counter
from pathlib import Path

import numpy as np

from hmoe_megatron.data.data_set import SCHEMA
from hmoe_megatron.files import atomic_write, sha256_file, sync
from hmoe_megatron.tools.data_prep.index import write_index
from hmoe_megatron.tools.data_prep.shard import QUARANTINE, Shard

PACKAGES = ("megatron-core", "numpy", "sentencepiece", "tokenizers", "tiktoken", "pyarrow")


def data_set_name(prefix: str | Path, key: str) -> Path:
    """Megatron's own name for the documents of one key; what --data-path takes."""
    prefix = Path(prefix)
    return prefix.with_name(f"{prefix.name}_{key}_document")


def is_output(path: str | Path, prefix: str | Path, keys: list[str]) -> bool:
    """Whether a run of this prefix and these keys makes that file."""
    names = [f"{data_set_name(prefix, key)}{suffix}" for key in keys for suffix in (".bin", ".idx", ".json")]
    return os.path.abspath(path) in map(os.path.abspath, [*names, quarantine_path(prefix)])


def quarantine_path(prefix: str | Path) -> Path:
    return Path(f"{prefix}.quarantine.jsonl")


def fingerprint(request: dict) -> str:
    return hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()


def is_published(prefix: str, keys: list[str], request: dict) -> bool:
    """Whether the data sets are there, whole, made by this request. Raises ValueError if others are."""
    names = [data_set_name(prefix, key) for key in keys]
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
                f"--output-prefix {prefix}: {name}.idx was made from other input or flags, or is "
                "damaged; remove it or choose another prefix"
            )
    return len(existing) == len(names)


def publish(prefix: str, keys: list[str], shards: list[Shard], request: dict) -> dict:
    """Joins the finished shards, in their order, under the final names, the .idx last; removes their folders.

    request: all that decides the bytes, with hashes of the inputs. Returns the counts. Killed on the way and called
    again it ends the same.
    """
    counts = {
        "records": sum(shard.progress.records for shard in shards),
        "documents": sum(shard.progress.documents for shard in shards),
        "bad_records": dict(sorted(sum((Counter(shard.progress.bad) for shard in shards), Counter()).items())),
        "tokens": [sum(tokens) for tokens in zip(*(shard.progress.tokens for shard in shards), strict=True)],
    }
    assert counts["records"] == counts["documents"] + sum(counts["bad_records"].values()), "a record is lost"
    folder, prefix = shards[0].folder, Path(prefix)
    is_kept = any(shard.progress.bytes[QUARANTINE] for shard in shards)
    ready = folder / "ready"
    if not ready.is_dir():
        building = folder / "building"
        shutil.rmtree(building, ignore_errors=True)
        building.mkdir()
        for number, key in enumerate(keys):
            _build(
                building,
                data_set_name(prefix, key).name,
                number,
                shards,
                {
                    "schema": SCHEMA,
                    "fingerprint": fingerprint(request),
                    "json_key": key,
                    "request": request,
                    **shards[0].progress.tokenizer,
                    "counts": {**counts, "tokens": counts["tokens"][number]},
                    "versions": _versions(),
                },
            )
        if is_kept:
            _join([shard.folder / QUARANTINE for shard in shards], building / quarantine_path(prefix).name)
        for path in building.iterdir():
            sync(path)
        sync(building)
        os.replace(building, ready)
    for file in sorted(ready.iterdir(), key=lambda file: (file.suffix == ".idx", file.name)):
        os.replace(file, prefix.with_name(file.name))
    if not is_kept:  # one that is there is of an older run
        quarantine_path(prefix).unlink(missing_ok=True)
    sync(prefix.absolute().parent)
    for shard in reversed(shards):  # the first, which says that all is done, last
        shard.remove()
    return counts


def _build(folder: Path, name: str, number: int, shards: list[Shard], sidecar: dict) -> None:
    dtype = np.dtype(sidecar["dtype"]).type
    lengths = [shard.folder / f"{number}.lengths" for shard in shards]
    documents, tokens = write_index(folder / f"{name}.idx", lengths, dtype)
    assert (documents, tokens) == (sidecar["counts"]["documents"], sidecar["counts"]["tokens"]), "counts differ"
    _join([shard.folder / f"{number}.bin" for shard in shards], folder / f"{name}.bin")
    outputs = [folder / f"{name}{suffix}" for suffix in (".bin", ".idx")]
    sidecar["outputs"] = {path.name: {"bytes": path.stat().st_size, "sha256": sha256_file(path)} for path in outputs}
    atomic_write(folder / f"{name}.json", (json.dumps(sidecar, indent=1) + "\n").encode())


def _join(parts: list[Path], path: Path) -> None:
    """One file of all parts. Of one part it is the part itself under a second name: nothing is copied."""
    if len(parts) == 1:
        with contextlib.suppress(OSError):  # a file system without links
            os.link(parts[0], path)
            return
    with open(path, "wb") as whole:
        for part in parts:
            with open(part, "rb") as file:
                shutil.copyfileobj(file, whole, 1 << 20)
        whole.flush()
        os.fsync(whole.fileno())


def _versions() -> dict[str, str]:
    found = {"python": ".".join(map(str, sys.version_info[:3]))}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found
