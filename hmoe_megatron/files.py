"""Names of a run's files; files that are either whole or not there, and their hashes."""

import hashlib
import os
from pathlib import Path

PLAN_FILE = "placement_plan.json"
RUN_ARGUMENTS_FILE = "run_arguments.json"
TELEMETRY_FILE = "telemetry.jsonl"

def write_whole(path: str | Path, data: bytes) -> None:
    """Write ``data`` under a temporary name in the same directory, on the disk, then rename: never half a file."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def sha256_file(path: str | Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
