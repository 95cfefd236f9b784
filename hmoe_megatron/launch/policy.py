"""What failed, and whether and when to start again. Pure."""

import signal
from dataclasses import dataclass

# Exit codes of pretrain_hmoe.py that another start would only repeat.
REFUSED = {2: "settings refused", 3: "checkpoint refused"}
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


class Restarts:
    """Counts the failures in a row, that is since a checkpoint was saved, against ``limit``."""

    def __init__(self, limit: int, first_wait_s: float, most_wait_s: float):
        self.limit, self.first_wait_s, self.most_wait_s = limit, first_wait_s, most_wait_s
        self.failures = 0

    def wait_s(self, saved_since: bool) -> float | None:
        """After one more failure: seconds to wait before the restart, None where none is left."""
        self.failures = 1 if saved_since else self.failures + 1
        if self.failures > self.limit:
            return None
        return min(self.most_wait_s, self.first_wait_s * 2 ** min(self.failures - 1, MAX_DOUBLINGS))
