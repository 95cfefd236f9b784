"""Names of a run's files; files written atomically, their hashes, and files of others read back."""

import contextlib
import fcntl
import hashlib
import os
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

PLAN_FILE = "placement_plan.json"
RUN_ARGUMENTS_FILE = "run_arguments.json"
RUN_SOFTWARE_FILE = "run_software.json"
TELEMETRY_FILE = "telemetry.jsonl"
REPLANS_FILE = "replans.jsonl"
LOG_FILE = "megatron.log"


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


def is_utf8(word: str) -> bool:
    """Whether a word of the command line was UTF-8: other bytes come in it as halves of surrogate pairs."""
    return not any("\ud800" <= letter <= "\udfff" for letter in word)


def check_output(path: str | Path, flag: str) -> None:
    """Raises ValueError for a name under which no file can come to be, also after its folders are made."""
    if Path(path).is_dir():
        raise ValueError(f"{flag} {path}: a directory; give a file")
    folder = next(folder for folder in Path(path).absolute().parents if folder.exists() or folder.is_symlink())
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        raise ValueError(f"{flag} {path}: {folder} is no directory that this user can write to")


def atomic_write(path: str | Path, data: bytes) -> None:
    """Write ``data`` under a temporary name in the same directory, which is made if it is not there, on the disk, then
    rename: never half a file."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def check_new(path: Path, flag: str) -> None:
    """Raises ValueError for the name of a directory that is there, or can't come to be."""
    if path.exists() or path.is_symlink():
        raise ValueError(f"{flag} {path}: exists already; give another, or remove it")
    check_output(path, flag)


@contextlib.contextmanager
def atomic_directory(path: str | Path, flag: str) -> Iterator[Path]:
    """An empty directory beside ``path``, which gets that name, on the disk, if the block ends well, and is removed if
    not. What a killed one left is cleared.

    flag: that names `path`. Raises ValueError if `path` exists, can't be made, or another process is making it.
    """
    path = Path(path).absolute()
    check_new(path, flag)
    path.parent.mkdir(parents=True, exist_ok=True)
    folder = path.with_name(f".{path.name}.writing")
    folder.mkdir(exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            is_ours = folder.exists() and os.path.samestat(os.fstat(descriptor), folder.stat())
        except BlockingIOError:
            is_ours = False
        if not is_ours:
            raise ValueError(f"{flag} {path}: another process is writing it; wait for it, or give another")
        try:
            for left in folder.iterdir():
                shutil.rmtree(left) if left.is_dir() and not left.is_symlink() else left.unlink()
            yield folder
            for written in (*folder.rglob("*"), folder):
                sync(written)
            os.rename(folder, path)
            sync(path.parent)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    finally:
        os.close(descriptor)


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
