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
            return f"rank {self.rank} on {self.host} was killed by {signal_name(-self.code)}"
        return f"rank {self.rank} on {self.host} ended with exit code {self.code}"


def signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # a real-time signal
        return f"signal {number}"


def cause(failures: list[Failure]) -> Failure:
    """The one to name: the first refusal, else the first of all. The others follow from it."""
    return next((failure for failure in failures if failure.code in REFUSED), failures[0])


@dataclass(frozen=True)
class Decision:
    """code: of the run, which ends; None: the next attempt starts after ``wait_s`` seconds. line: what to print."""

    code: int | None
    line: str
    wait_s: float = 0.0


class Restarts:
    """Counts the failures in a row, that is since a checkpoint was saved, against ``limit``."""

    def __init__(self, limit: int, first_wait_s: float, most_wait_s: float, checkpoints: Path):
        self.limit, self.first_wait_s, self.most_wait_s, self.checkpoints = (
            limit,
            first_wait_s,
            most_wait_s,
            checkpoints,
        )
        self.failures, self.step = 0, self._saved_step()

    def decide(self, failures: list[Failure]) -> Decision:
        """After an attempt that failed; ``failures`` in the order in which they were seen."""
        failure = cause(failures)
        if why := REFUSED.get(failure.code):
            return Decision(failure.code, f"{failure}: {why}, no restart")
        before, self.step = self.step, self._saved_step()
        progress = self.step is not None and self.step > (before or 0)
        self.failures = 1 if progress else self.failures + 1
        if self.failures > self.limit:
            return Decision(1, f"{failure}: {self.limit} restarts without a new checkpoint, giving up")
        wait_s = min(self.most_wait_s, self.first_wait_s * 2 ** min(self.failures - 1, MAX_DOUBLINGS))
        place = "the beginning" if self.step is None else f"step {self.step}"
        line = f"{failure}: restart {self.failures} of {self.limit} from {place} in {wait_s:g} s"
        return Decision(None, line, wait_s)

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
        raise ValueError(
            f"--save {given.save} is not --load {given.load}: a restart would not go on from what the run "
            "saved; give one directory to both"
        )
    return Path(given.save)
