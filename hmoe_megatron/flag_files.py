"""Flags of `pretrain_hmoe.py` from files: an .args file, and what a run was started with."""

import shlex
from collections.abc import Sequence
from pathlib import Path

from hmoe_megatron.files import RUN_ARGUMENTS_FILE
from hmoe_megatron.untrusted import parsed

MAX_BYTES = 1 << 20


def read_args(path: str | Path, included_by: tuple[Path, ...] = ()) -> list[str]:
    """Flags and values of an .args file, includes expanded where they stand. ValueError names file and line."""
    path = Path(path).resolve()
    if path in included_by:
        raise ValueError(f"{included_by[-1]}: includes {path}, which includes it: remove one of the two")
    words = []
    try:
        lines = path.read_text().splitlines()
    except UnicodeDecodeError:
        raise ValueError(f"{path}: not text") from None
    for number, line in enumerate(lines, 1):
        try:
            first, *rest = shlex.split(line, comments=True) or [None]
        except ValueError as error:
            raise ValueError(f"{path}:{number}: {error}: {line!r}") from None
        if first == "include" and len(rest) == 1:
            words += read_args(path.parent / rest[0], (*included_by, path))
        elif first and first.startswith("--"):
            words += [first, *rest]
        elif first:
            raise ValueError(f"{path}:{number}: {line!r}: give '--flag value', 'include FILE.args' or '# comment'")
    return words


def run_arguments(run_dir: Path) -> list[str]:
    """The flags that ``pretrain_hmoe.py`` was started with. Raises ValueError with file and remedy."""
    path = Path(run_dir) / RUN_ARGUMENTS_FILE
    if not path.is_file():
        raise ValueError(f"{path} is missing: give the --save directory of a run of pretrain_hmoe.py")
    if path.stat().st_size > MAX_BYTES:
        raise ValueError(f"{path}: over {MAX_BYTES} bytes: not written by pretrain_hmoe.py")
    try:
        argv = parsed("flags of a run", path.read_bytes().decode(), MAX_BYTES)
    except ValueError as error:  # also not UTF-8
        raise ValueError(f"{path}: not JSON: {error}") from None
    if not isinstance(argv, list) or not all(isinstance(word, str) for word in argv):
        raise ValueError(f"{path}: not a list of flags: not written by pretrain_hmoe.py")
    return argv


def last_value(flags: Sequence[str], name: str, default=None):
    """The value of the last `name` among the flags."""
    found = default
    for at, word in enumerate(flags):
        if word == name and at + 1 < len(flags):
            found = flags[at + 1]
        elif word.startswith(f"{name}="):
            found = word.partition("=")[2]
    return found


def flag_named(attribute: str) -> str:
    """The command line's name of an attribute of parsed arguments."""
    return f"--{attribute.replace('_', '-')}"
