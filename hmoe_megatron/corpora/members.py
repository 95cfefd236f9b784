"""Files out of archives that nobody vouches for: read to memory by name, within limits; nothing is ever extracted."""

import gzip
import io
import re
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

MAX_MEMBER_BYTES = 64_000_000
AR_MAGIC, AR_HEADER_BYTES = b"!<arch>\n", 60


def open_tar(archive: Path, file: BinaryIO) -> tarfile.TarFile:
    """The tar in a .tar.gz, or the data.tar of a .deb, as a stream. A .deb is an ar archive: read here and not by
    dpkg-deb, so that --archive works on clusters that are not Debian. Raises ValueError."""
    if file.read(len(AR_MAGIC)) != AR_MAGIC:
        file.seek(0)
        return tarfile.open(fileobj=file, mode="r|gz")
    while len(header := file.read(AR_HEADER_BYTES)) == AR_HEADER_BYTES:
        name, size = header[:16].strip().rstrip(b"/"), header[48:58].strip()
        if name.startswith(b"data.tar") and (form := {b".xz": "xz", b".gz": "gz", b"": ""}.get(name[8:])) is not None:
            return tarfile.open(fileobj=file, mode=f"r|{form}")  # the last member: the stream ends with the tar
        if not size.isdigit():
            break
        file.seek(int(size) + int(size) % 2, 1)
    raise ValueError(f"{archive}: no data.tar in it that can be read; do not use this archive")


def tar_members(archive: Path, wanted: re.Pattern, max_bytes: int = MAX_MEMBER_BYTES) -> Iterator[tuple[str, bytes]]:
    """(first group of `wanted`, bytes) of the members whose whole name is `wanted`, in the archive's order.

    Raises ValueError for one that is no plain file, is bigger than max_bytes or is there twice, and for a broken tar.
    """
    seen = set()
    with open(archive, "rb") as file:
        try:
            with open_tar(archive, file) as tar:
                for member in tar:
                    if not (found := wanted.fullmatch(member.name)):
                        continue
                    if not member.isreg() or member.size > max_bytes or member.name in seen:
                        raise ValueError(
                            f"{archive}: {member.name} is a link, too big or there twice; do not use this archive"
                        )
                    seen.add(member.name)
                    yield found[1], tar.extractfile(member).read()
        except (tarfile.TarError, EOFError) as error:
            raise ValueError(f"{archive}: damaged ({error}); delete it and download it again") from error


def gunzip(name: str, data: bytes, max_bytes: int = MAX_MEMBER_BYTES) -> bytes:
    """Raises ValueError if it is damaged or unpacks to more than max_bytes."""
    try:
        with gzip.GzipFile(fileobj=io.BytesIO(data)) as file:
            text = file.read(max_bytes + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{name}: damaged ({error})") from error
    if len(text) > max_bytes:
        raise ValueError(f"{name}: more than {max_bytes} bytes when unpacked")
    return text


def zip_member(archive: zipfile.ZipFile, name: str, max_bytes: int = MAX_MEMBER_BYTES) -> bytes:
    """Raises ValueError if it is missing or bigger than max_bytes, whatever its header says."""
    try:
        with archive.open(name) as file:
            data = file.read(max_bytes + 1)
    except (KeyError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{archive.filename}: {error}") from error
    if len(data) > max_bytes:
        raise ValueError(f"{archive.filename}: {name} has more than {max_bytes} bytes")
    return data
