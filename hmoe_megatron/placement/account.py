"""What a run may lose by changing plans: time spent, against the time of staying with the first plan."""

import math
from dataclasses import dataclass


@dataclass
class Account:
    """Times of a run of `run` micro-batches, of which at most the share `max_loss` is to be lost.

    If each change of plan leaves `room` for its way back, and the way back is taken when just that is left, then

        spent <= (1 + max_loss) * stay + what one observation loses

    whatever the loads, as long as the rest of the run is, on average, no faster than `fastest`.
    """

    run: int
    max_loss: float
    done: int = 0  # micro-batches
    stay: float = 0.0  # what they would have taken with the first plan
    spent: float = 0.0  # what they took, with moves and planning
    fastest: float = math.inf  # micro-batch of an observation so far, with its work in balance

    def book(self, micro_batches: int, stay: float, now: float, balanced: float) -> None:
        """An observation of so many micro-batches; times of one of them."""
        self.done += micro_batches
        self.stay += micro_batches * stay
        self.spent += micro_batches * now
        self.fastest = min(self.fastest, balanced)

    @property
    def left(self) -> int:
        """Micro-batches to come."""
        return max(self.run - self.done, 0)

    @property
    def room(self) -> float:
        """Time that may still be lost."""
        return self.max_loss * (self.stay + self.left * self.fastest) - (self.spent - self.stay)
