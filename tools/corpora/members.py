"""Read files from untrusted archives: into memory, by name, within limits. Nothing is extracted to disk."""

import gzip
import io
import re
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

MAX_MEMBER_BYTES = 64_000_000
AR_MAGIC, AR_HEADER_BYTES = b"!<arch>\n", 60


def open_tar(archive: Path, file: BinaryIO) -> tarfile.TarFile:
    """The tar in a .tar.gz, or the data.tar of a .deb, as a stream. Raises ValueError.

    A .deb is an ar archive. It is read without dpkg-deb, so that --archive works on clusters that are not Debian.
    """
    if file.read(len(AR_MAGIC)) != AR_MAGIC:
        file.seek(0)
        return tarfile.open(fileobj=file, mode="r|gz")
    while len(header := file.read(AR_HEADER_BYTES)) == AR_HEADER_BYTES and header[48:58].strip().isdigit():
        if header.startswith(b"data.tar"):
            return tarfile.open(fileobj=file, mode="r|*")  # the last member: the stream ends with the tar
        size = int(header[48:58])
        file.seek(size + size % 2, 1)
    raise ValueError(f"{archive}: no data.tar in it; do not use this archive")


def tar_members(archive: Path, wanted: re.Pattern, max_bytes: int = MAX_MEMBER_BYTES) -> Iterator[tuple[str, bytes]]:
    """(first group of `wanted`, bytes) of the members whose whole name matches, in the archive's order.

    Raises ValueError for one that is not a regular file, is larger than max_bytes or is listed twice, and for a
    damaged tar.
    """
    seen = set()
    with open(archive, "rb") as file:
        try:
            with open_tar(archive, file) as tar:
                for member in tar:
                    if not (found := wanted.fullmatch(member.name)):
                        continue
                    if not member.isreg() or member.size > max_bytes or member.name in seen:
                        problem = f"{member.name} is a link, too large or listed twice"
                        raise ValueError(f"{archive}: {problem}; do not use this archive")
                    seen.add(member.name)
                    yield found[1], tar.extractfile(member).read()
        except (tarfile.TarError, EOFError) as error:
            raise ValueError(f"{archive}: damaged ({error}); delete it and download it again") from error


def gunzip(name: str, data: bytes, max_bytes: int = MAX_MEMBER_BYTES) -> bytes:
    """Raises ValueError if it is damaged or unpacks to more than max_bytes."""
    return _read(name, lambda: gzip.GzipFile(fileobj=io.BytesIO(data)), max_bytes)


def zip_member(archive: zipfile.ZipFile, name: str, max_bytes: int = MAX_MEMBER_BYTES) -> bytes:
    """Raises ValueError if it is missing, damaged or larger than max_bytes, whatever its header says."""
    return _read(f"{archive.filename}: {name}", lambda: archive.open(name), max_bytes)


def _read(name: str, opened: Callable[[], BinaryIO], max_bytes: int) -> bytes:
    try:
        with opened() as file:
            data = file.read(max_bytes + 1)
    except (KeyError, OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{name}: missing or damaged ({error})") from error
    if len(data) > max_bytes:
        raise ValueError(f"{name}: more than {max_bytes} bytes when unpacked")
    return data


def decode(data: bytes) -> str:
    """UTF-8, else cp1252, which older files are written in (GCIDE has such a byte)."""
    try:
        return data.decode()
    except UnicodeDecodeError:
        return data.decode("cp1252", errors="replace")
