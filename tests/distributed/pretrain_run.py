"""The entry point in ranks of `run_ranks`: a whole run, from its flags to its exit code, in seconds."""

import contextlib
import io
import sys
from typing import NamedTuple

from tests.distributed.training_run import TINY

# Ranks come from a fork server, whose children can't start loader processes of their own.
MODEL = "--hmoe-widths 16,32,48,64 --num-workers 0 --hmoe-console megatron"


class Ended(NamedTuple):
    """code: of the process; output: what it printed, both streams; step: of the loop when it ended, from 0."""

    code: int
    output: str
    step: int

    def errors(self) -> list[str]:
        """The lines that say why a run ended."""
        return [line for line in self.output.splitlines() if line.startswith("pretrain_hmoe.py: error: ")]


class _Tee(io.StringIO):
    def __init__(self, stream):
        super().__init__()
        self.stream = stream

    def write(self, text):
        self.stream.write(text)
        return super().write(text)


def pretrain(flags: str, prepare=None, *given, without: tuple[str, ...] = ()) -> Ended:
    """pretrain_hmoe.py with TINY, MODEL and `flags` on this rank; `prepare(*given)` is called in this process first.

    without: switches of TINY to leave out.
    """
    from hmoe_megatron.training import prepare as prepare_megatron

    prepare_megatron()
    if prepare:
        prepare(*given)
    tiny = [flag for flag in TINY if flag not in without]
    code, output = start([*tiny, *MODEL.split(), *flags.split()])
    from megatron.training.global_vars import _GLOBAL_ARGS as args

    return Ended(code, output, getattr(args, "curr_iteration", 0))


def start(words: list[str]) -> tuple[int, str]:
    """(exit code, output) of pretrain_hmoe.py with these words, in this process."""
    import pretrain_hmoe

    sys.argv = ["pretrain_hmoe.py", *words]
    return said_by(pretrain_hmoe.main)


def said_by(main) -> tuple[int, str]:
    """(exit code of `main`, what it printed); the rank's log has it too."""
    output = _Tee(sys.stdout)
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        try:
            code = main()
        except SystemExit as left:
            code = left.code or 0
    return code, output.getvalue()
