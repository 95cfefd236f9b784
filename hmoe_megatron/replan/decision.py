"""When experts move: whether the plan proposed for the loads of a window is worth it, and whether the last ones were.

A change is made where the proposed plan is faster by LEAST_GAIN under the loads of the window, and where all changes
together, this one as long as the last one took for its bytes, take at most the share ``max_loss`` of the run's time so
far. So whatever the loads do, a run with changes loses at most that share, and what a wrong plan loses in one window: a
plan that is slower under the next loads is replaced, and after three in a row that gave less than half of what they
promised the best plan so far comes back.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from hmoe_megatron.placement.cost import piece_times
from hmoe_megatron.placement.moves import diff, moved_bytes
from hmoe_megatron.placement.plan import PlacementPlan
from hmoe_megatron.replan.proposal import LEAST_GAIN

DISAPPOINTMENTS = 3  # in a row: changes that gave less than half of what they promised
REMEMBERED = 8  # plans that may come back


class Verdict(NamedTuple):
    """plan: the one to change to, or None. gain: share of the experts' time that it promises; before, after: slowest
    rank over the mean, under the window's loads. why: for people, where a change was wished and is not made, or where
    an earlier plan comes back."""

    plan: PlacementPlan | None
    gain: float
    before: float
    after: float
    why: str


def stage_time(plan: PlacementPlan, tokens_LE: Sequence[np.ndarray]) -> float:
    """Of the slowest pipeline stage, in the unit of the plan's cost: of each of its layers the slowest rank."""
    times: dict[int, float] = {}
    for stage, time_R in zip(plan.stages, _rank_times(plan, tokens_LE), strict=True):
        times[stage] = times.get(stage, 0.0) + max(time_R)
    return max(times.values())


def over_mean(plan: PlacementPlan, tokens_LE: Sequence[np.ndarray]) -> float:
    """Time of the slowest rank over the mean, layer by layer, all layers together."""
    times = _rank_times(plan, tokens_LE)
    mean = sum(sum(time_R) / len(time_R) for time_R in times)
    return sum(map(max, times)) / mean if mean else 1.0


def _rank_times(plan: PlacementPlan, tokens_LE) -> list[list[float]]:
    return [
        [sum(held) for held in piece_times(layer.pieces, tokens_E, plan.cost, plan.rank_specs)]
        for layer, tokens_E in zip(plan.layers, tokens_LE, strict=True)
    ]


@dataclass
class Decision:
    """max_loss: share of the run's time that changes may take. One object a run, on one rank."""

    max_loss: float
    spent_s: float = 0.0
    spent_bytes: float = 0.0
    promised: float | None = None  # gain of the last change, until the window after it
    disappointments: int = 0
    plans: list[PlacementPlan] = field(default_factory=list)  # in force before, the newest last

    def judge(self, now: PlacementPlan, proposed: PlacementPlan, tokens_LE, run_s: float) -> Verdict:
        """run_s: how long the run has taken so far. ``now`` is in force, ``proposed`` was made for tokens_LE."""
        time, before = stage_time(now, tokens_LE), over_mean(now, tokens_LE)
        if self._look_back(time, tokens_LE):
            best = min(self.plans, key=lambda plan: stage_time(plan, tokens_LE))
            if stage_time(best, tokens_LE) < time:
                proposed, why = best, f"{DISAPPOINTMENTS} changes in a row gave less than half of what they promised"
                return self._verdict(
                    now, proposed, time, before, tokens_LE, run_s, f"{why}: back to the best plan so far"
                )
        return self._verdict(now, proposed, time, before, tokens_LE, run_s, "")

    def _look_back(self, time: float, tokens_LE) -> bool:
        """Whether changes have disappointed often enough."""
        if self.promised is not None and self.plans:
            came_true = 1 - time / stage_time(self.plans[-1], tokens_LE)
            self.disappointments = self.disappointments + 1 if came_true < self.promised / 2 else 0
            self.promised = None
        if self.disappointments < DISAPPOINTMENTS:
            return False
        self.disappointments = 0
        return True

    def _verdict(self, now, proposed, time, before, tokens_LE, run_s, why: str) -> Verdict:
        gain = 1 - stage_time(proposed, tokens_LE) / time if time else 0.0
        after = over_mean(proposed, tokens_LE)
        if gain < LEAST_GAIN:
            return Verdict(None, gain, before, before, "")
        amount = moved_bytes(diff(now, proposed), now.cost)
        next_s = self.spent_s / self.spent_bytes * amount if self.spent_bytes else 0.0
        if self.spent_s + next_s > self.max_loss * run_s:
            return Verdict(
                None,
                gain,
                before,
                after,
                f"a change that would make experts {gain:.1%} faster waits: with it changes would have taken "
                f"{self.spent_s + next_s:.1f} s of {run_s:.0f} s, more than --hmoe-replan-max-loss {self.max_loss:g}",
            )
        return Verdict(proposed, gain, before, after, why)

    def made(self, before: PlacementPlan, now: PlacementPlan, gain: float, seconds: float) -> None:
        """A change was made."""
        self.spent_s += seconds
        self.spent_bytes += moved_bytes(diff(before, now), now.cost)
        self.promised = gain
        self.plans = [*self.plans, before][-REMEMBERED:]
