"""What failed, and whether and when to start again: decided by node 0's launcher alone."""

import argparse
import os
import signal
from dataclasses import dataclass
from pathlib import Path

# Exit codes of pretrain_hmoe.py that another start would only repeat.
REFUSED = {2: "settings refused", 3: "checkpoint refused"}
TRACKER = "latest_checkpointed_iteration.txt"  # Megatron's
MAX_DOUBLINGS = 30  # far over any cap; keeps the number a number


@dataclass(frozen=True)
class Failure:
    """rank: None is the node's own launcher. code: as of subprocess, a signal is negative."""

    host: str
    rank: int | None
    code: int

    def __str__(self) -> str:
        if self.rank is None:
            return f"the launcher on {self.host} is gone"
        if self.code < 0:
            names = {number: number.name for number in signal.Signals}  # real-time signals have none
            return f"rank {self.rank} on {self.host} was killed by {names.get(-self.code, f'signal {-self.code}')}"
        return f"rank {self.rank} on {self.host} ended with exit code {self.code}"


def cause(failures: list[Failure]) -> Failure:
    """The one to name: the first refusal, else the first of all. The others follow from it."""
    return next((failure for failure in failures if failure.code in REFUSED), failures[0])


@dataclass
class Restarts:
    """Counts the failures in a row, that is since a checkpoint was saved, against ``limit``."""

    limit: int
    first_wait_s: float
    most_wait_s: float
    checkpoints: Path
    failures: int = 0

    def __post_init__(self):
        self.step = self._saved_step()

    def decide(self, failures: list[Failure]) -> tuple[int | None, str, float]:
        """After an attempt with ``failures`` in the order in which they were seen: (exit code of the run, which ends,
        or None for a restart; the line to print; seconds to wait before the restart)."""
        failure = cause(failures)
        if why := REFUSED.get(failure.code):
            return failure.code, f"{failure}: {why}, no restart", 0
        before, self.step = self.step, self._saved_step()
        progress = self.step is not None and self.step > (before or 0)
        self.failures = 1 if progress else self.failures + 1
        if self.failures > self.limit:
            return 1, f"{failure}: {self.limit} restarts without a new checkpoint, giving up", 0
        wait_s = min(self.most_wait_s, self.first_wait_s * 2 ** min(self.failures - 1, MAX_DOUBLINGS))
        place = "the beginning" if self.step is None else f"step {self.step}"
        return None, f"{failure}: restart {self.failures} of {self.limit} from {place} in {wait_s:g} s", wait_s

    def _saved_step(self) -> int | None:
        """Of the newest complete checkpoint; None while there is none."""
        try:
            return int((self.checkpoints / TRACKER).read_text())
        except (OSError, ValueError):
            return None


def checkpoint_directory(flags: list[str]) -> Path:
    """Where the run saves and loads. ValueError unless that is one place: a restart would begin anew."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--save")
    parser.add_argument("--load")
    given = parser.parse_known_args(flags)[0]
    missing = [f"--{name}" for name in ("save", "load") if not getattr(given, name)]
    if missing:
        raise ValueError(f"no {' and no '.join(missing)}: a restart would begin anew; add --save DIR --load DIR")
    if os.path.realpath(given.save) != os.path.realpath(given.load):
        why = "a restart would not go on from what the run saved; give one directory to both"
        raise ValueError(f"--save {given.save} is not --load {given.load}: {why}")
    return Path(given.save)
