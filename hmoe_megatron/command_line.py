"""What pretrain_hmoe.py says of its flags by itself: a short help, and what is wrong with a word. Imports no torch."""

import argparse
import dataclasses
import functools
import os
import shlex
import sys
import textwrap
from collections.abc import Sequence

from hmoe_megatron.config import HMoEConfig, add_hmoe_arguments, flag_of
from hmoe_megatron.flag_files import last_value
from hmoe_megatron.untrusted import near

COLUMNS = 100
_NAME_COLUMNS = 32
_HEAD = """\
usage: torchrun --nproc-per-node RANKS pretrain_hmoe.py FLAG ...
       python examples/run.py FILE.args FLAG ...        flags from a file; prints the torchrun line

Trains a language model whose experts differ in width. Needed: --num-layers, --hidden-size,
--num-attention-heads, --seq-length, --micro-batch-size, --num-experts, --train-iters, --lr,
--eval-interval, and --data-path or --mock-data. Without a GPU it runs on the CPU.

Flags of unequal experts (in full: docs/flags.md):
"""
_FOOT = """
All other flags are Megatron's: --help-all lists them, with these, on some 4,000 lines.
"""


def short_help() -> str:
    lines = []
    for field in dataclasses.fields(HMoEConfig):
        first, _, rest = (field.metadata["help"] + " ").partition(". ")
        more = " ..." if rest.strip() else ""
        text = textwrap.wrap(first.strip() + more, COLUMNS - _NAME_COLUMNS - 2)
        lines.append(f"  {flag_of(field.name):<{_NAME_COLUMNS}}{text[0]}")
        lines += [" " * (_NAME_COLUMNS + 2) + line for line in text[1:]]
    return _HEAD + "\n".join(lines) + "\n" + _FOOT


def add_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Ours, and short errors (Megatron's ``extra_args_provider``)."""
    parser.error = functools.partial(_say_what_is_wrong, parser)
    add_hmoe_arguments(parser)
    next(action for action in parser._actions if action.dest == "yaml_cfg").type = _no_yaml
    parser.add_argument("--world-size", type=int, dest="checked_ranks", help="ranks, for --hmoe-check-only")
    return parser


def _no_yaml(path: str):
    """Megatron reads that file while it parses, and then forgets all flags, ours too."""
    raise argparse.ArgumentTypeError(f"{path:.80}: no settings are taken from YAML: give them as flags")


def checked_ranks(argv: Sequence[str]) -> int | None:
    """Of --world-size; None where this machine's own ranks are meant. Raises ValueError."""
    given = last_value(argv, "--world-size")
    if given is not None and not (given.isdecimal() and int(given) > 0):
        raise ValueError(f"--world-size {given:.40}: give the number of ranks, 1 or more")
    return given and int(given)


def _say_what_is_wrong(parser: argparse.ArgumentParser, message: str) -> None:
    """In place of argparse's error, which prints all of Megatron's flags. Ends the process; rank 0 speaks."""
    lines = [f"pretrain_hmoe.py: error: {message:.1000}"]
    if message.startswith("unrecognized arguments: "):
        known = [flag for action in parser._actions for flag in action.option_strings]
        flags = [word.partition("=")[0] for word in shlex.split(message.partition(": ")[2]) if word.startswith("--")]
        lines += [f"  {flag}: no such flag{near(flag, known)}" for flag in flags[:3]]
    lines.append("--help: the flags of unequal experts; --help-all: all")
    if os.environ.get("RANK", "0") in ("", "0"):
        print("\n".join(lines), file=sys.stderr, flush=True)
    sys.exit(2)
