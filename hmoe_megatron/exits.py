"""Why a run ends, each reason with an exit code of its own: see docs/checkpoints.md and `tools/launch.py`."""

OTHER_CHECKPOINT = "give another checkpoint as --ckpt-step N"


class RunEnded(Exception):
    """The run can't go on; the message names what, where, and what to do. It is one line, and no traceback is shown.

    on_every_rank: all ranks raise it together, so that one of them says it; else this rank alone knows.
    """

    exit_code = 1

    def __init__(self, message: str, on_every_rank: bool = True):
        super().__init__(message)
        self.on_every_rank = on_every_rank


class DataRefused(RunEnded):
    """The data or its cached index can't be read."""

    exit_code = 2


class CheckpointRefused(RunEnded):
    """What --load names is missing, damaged, not finite, or of another model. Trying again does not help."""

    exit_code = 3


class SavingFailed(RunEnded):
    """Checkpoints can't be written; the last one that was is as good as before."""

    exit_code = 4


class DirectoryInUse(RunEnded):
    """Another run saves to the directory that --save names."""

    exit_code = 5
