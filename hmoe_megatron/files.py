"""Names of a run's files; files that are either whole or not there, their hashes, and files of others read back."""

import hashlib
import os
import stat
from pathlib import Path
from typing import BinaryIO

PLAN_FILE = "placement_plan.json"
RUN_ARGUMENTS_FILE = "run_arguments.json"
TELEMETRY_FILE = "telemetry.jsonl"


def open_regular(path: str | os.PathLike) -> BinaryIO:
    """The file, open to read bytes. Raises ValueError that says why it can't be read, without its path."""
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # a pipe would block, a device might never end
            raise ValueError("not a regular file")
        return open(path, "rb")
    except OSError as error:
        raise ValueError(error.strerror) from None


def read_text(path: str | os.PathLike, max_bytes: int) -> str:
    """UTF-8 text of a regular file; of a longer one more than max_bytes of it. Raises ValueError as `open_regular`."""
    with open_regular(path) as file:
        try:
            return file.read(max_bytes + 1).decode()
        except UnicodeDecodeError:
            raise ValueError("not UTF-8 text") from None


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


def sync(path: str | Path) -> None:
    """Have a file's bytes, or the names in a directory, on the disk, so that a power cut keeps them."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_file(path: str | Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def file_hashes(*paths: str | None) -> dict[str, str]:
    """{name: SHA-256} of files and of the files of folders; what is no path on this disk is left out."""
    hashes = {}
    for root in (Path(path) for path in paths if path and os.path.exists(path)):
        files = sorted(file for file in root.rglob("*") if file.is_file()) if root.is_dir() else [root]
        hashes |= {str(file.relative_to(root.parent)): sha256_file(file) for file in files}
    return hashes
