"""Experts that get no token for a long time. Legend: L MoE layers, E logical experts."""

import numpy as np

MOST_NAMED = 16  # experts in one line; the others are counted


class IdleExperts:
    """Says once of each expert that it got no token for ``patience_steps``, and again if it idles after getting one.

    ``layers``: decoder layers (from 0) of the rows of the counts. Steps before a run's start or resume do not count.
    """

    def __init__(self, layers: list[int], patience_steps: int):
        self.layers, self.patience_steps = layers, patience_steps
        self._last_step_LE = self._told_LE = None

    def look(self, step: int, counts_LE, since_step: int) -> str | None:
        """The line to print, if any. counts_LE: tokens of all ranks in the steps after ``since_step`` to ``step``."""
        counts_LE = np.asarray(counts_LE)
        if self._last_step_LE is None:
            self._last_step_LE, self._told_LE = np.full(counts_LE.shape, since_step), np.zeros(counts_LE.shape, bool)
        self._last_step_LE[counts_LE > 0] = step
        idle_LE = step - self._last_step_LE >= self.patience_steps
        new_LE = idle_LE & ~self._told_LE
        self._told_LE = idle_LE
        if not new_LE.any():
            return None
        return (
            f"warning: step {step}: no token for {self.patience_steps} steps: {self._names(new_LE)}. Their gradient is "
            "zero; they are saved as they are. To use them, raise --hmoe-p-penalty-coeff or --hmoe-load-balance-coeff"
        )

    def _names(self, new_LE) -> str:
        found = np.argwhere(new_LE)
        shown, parts = found[:MOST_NAMED], []
        for row in dict.fromkeys(shown[:, 0].tolist()):
            experts = shown[shown[:, 0] == row, 1]
            parts.append(f"layer {self.layers[row]} expert{'s' * (len(experts) > 1)} {' '.join(map(str, experts))}")
        more = f" and {len(found) - MOST_NAMED} more" if len(found) > MOST_NAMED else ""
        return "; ".join(parts) + more
