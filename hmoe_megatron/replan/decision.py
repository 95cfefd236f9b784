"""When experts move: whether the plan proposed for the loads of a window is worth it, and whether the last ones were.

A change is made where the proposed plan is faster by LEAST_GAIN under the loads of the window, and where three times
together are less than the share ``max_loss`` of the run's time so far: that of all looks and changes, this one as the
earlier ones took for their bytes; that of the way back from it to the first plan; what the run lost by its plans, as
predicted under the loads it had, against the first plan. When just the way back is left, it is taken. So whatever the
loads do, a run loses against one without changes at most

    max_loss of its time + one window under a wrong plan + a change and its way back,

the last because nobody knows before what a change takes. After three changes in a row that gave less than half of what
they promised the best plan so far comes back, and no other is tried for a while.
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
REMEMBERED = 8  # windows over which plans are compared, and plans that may come back beside the first


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


def gain(now: PlacementPlan, other: PlacementPlan, tokens_LE: Sequence[np.ndarray]) -> float:
    """Share of the experts' time that ``other`` saves; 0 without tokens."""
    time = stage_time(now, tokens_LE)
    return 1 - stage_time(other, tokens_LE) / time if time else 0.0


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
    """max_loss: share of the run's time that may be lost. One object a run, on one rank; all times are of one clock.

    After each verdict with a plan the caller makes the change and says so (`made`), also where only part of it, or
    nothing, has come about.
    """

    max_loss: float
    looked_s: float = 0.0  # planning, which every rank waits for
    spent_s: float = 0.0
    spent_bytes: float = 0.0
    behind_s: float = 0.0  # the first plan, changes left out, as if steps were experts alone; ahead of it below 0
    judged_s: float = 0.0  # end of the last window and of the change after it
    promised: float = 0.0  # gain of the last change, until the window after it
    disappointments: int = 0
    pause: int = DISAPPOINTMENTS  # windows without changes once the best plan is back; doubled each time
    pausing: int = 0  # of these, to come
    is_way_back: bool = False  # the last verdict: it promises nothing that can be broken
    plans: list[PlacementPlan] = field(default_factory=list)  # the first, then others in force before, the newest last
    windows: list[Sequence[np.ndarray]] = field(default_factory=list)  # tokens_LE of the last ones

    def judge(self, now: PlacementPlan, proposed: PlacementPlan, tokens_LE, run_s: float) -> Verdict:
        """At the end of a window. ``now`` is in force, ``proposed`` was made for tokens_LE; run_s: the run's time so
        far."""
        self.plans = self.plans or [now]
        self.windows = [*self.windows, tokens_LE][-REMEMBERED:]
        self._look_back(now, tokens_LE, run_s)
        pausing, self.pausing = self.pausing, max(self.pausing - 1, 0)
        lost_s, first = self.looked_s + self.spent_s + max(self.behind_s, 0.0), self.plans[0]
        room_s = self.max_loss * run_s - lost_s
        self.is_way_back = self.behind_s > 0 and room_s < self._seconds(now, first) and gain(now, first, tokens_LE) > 0
        if self.is_way_back:
            lost = f"changes have lost what --hmoe-replan-max-loss {self.max_loss:g} allows"
            return _verdict(now, first, tokens_LE, f"{lost}: back to the first plan")
        if self.disappointments >= DISAPPOINTMENTS:
            return self._back_to_best(now, tokens_LE, run_s, room_s)
        verdict = _verdict(now, proposed, tokens_LE, "")
        if verdict.gain < LEAST_GAIN:
            return verdict._replace(plan=None, after=verdict.before)
        if pausing:
            return _waits(verdict, f"the last ones did not keep what they promised; {pausing} windows more")
        return self._if_it_fits(now, verdict, run_s, room_s)

    def _back_to_best(self, now: PlacementPlan, tokens_LE, run_s: float, room_s: float) -> Verdict:
        best = min([now, *self.plans], key=lambda plan: sum(stage_time(plan, of) for of in self.windows))
        broken = f"{DISAPPOINTMENTS} changes in a row gave less than half of what they promised: the best plan so far"
        if best is now:
            self._begin_pause()
            return _verdict(now, now, tokens_LE, f"{broken} is in force and stays")._replace(plan=None)
        verdict = self._if_it_fits(now, _verdict(now, best, tokens_LE, f"{broken} comes back"), run_s, room_s)
        if verdict.plan:
            self.is_way_back = True
            self._begin_pause()
        return verdict

    def _if_it_fits(self, now: PlacementPlan, verdict: Verdict, run_s: float, room_s: float) -> Verdict:
        needed_s = self._seconds(now, verdict.plan) + self._seconds(verdict.plan, self.plans[0])
        if needed_s < room_s:
            return verdict
        return _waits(
            verdict,
            f"with its way back it takes {needed_s:.1f} s, and of {self.max_loss * run_s:.1f} s that "
            f"--hmoe-replan-max-loss {self.max_loss:g} allows so far {max(room_s, 0.0):.1f} s are left",
        )

    def made(self, before: PlacementPlan, now: PlacementPlan, seconds: float) -> None:
        """The change of the last verdict took so long, and ``now`` is what it has brought into force."""
        self.spent_s += seconds
        self.spent_bytes += moved_bytes(diff(before, now), now.cost)
        self.judged_s += seconds
        self.promised = 0.0 if self.is_way_back else gain(before, now, self.windows[-1])
        first, *others = self.plans
        self.plans = [first, *[*others, before][-REMEMBERED:]]

    def _look_back(self, now: PlacementPlan, tokens_LE, run_s: float) -> None:
        """What the window says of the plan in force."""
        self.behind_s += (run_s - self.judged_s) * gain(now, self.plans[0], tokens_LE)
        self.judged_s = run_s
        if self.promised > 0:
            is_kept = gain(self.plans[-1], now, tokens_LE) >= self.promised / 2
            self.disappointments = 0 if is_kept else self.disappointments + 1
            self.pause = DISAPPOINTMENTS if is_kept else self.pause
        self.promised = 0.0

    def _begin_pause(self) -> None:
        self.disappointments, self.pausing, self.pause = 0, self.pause, 2 * self.pause

    def _seconds(self, now: PlacementPlan, then: PlacementPlan) -> float:
        """What a change is expected to take: 0 until the first is made."""
        return self.spent_s / self.spent_bytes * moved_bytes(diff(now, then), now.cost) if self.spent_bytes else 0.0


def _verdict(now: PlacementPlan, then: PlacementPlan, tokens_LE, why: str) -> Verdict:
    return Verdict(then, gain(now, then, tokens_LE), over_mean(now, tokens_LE), over_mean(then, tokens_LE), why)


def _waits(verdict: Verdict, reason: str) -> Verdict:
    why = f"a change that would make experts {verdict.gain:.1%} faster waits: {reason}"
    return verdict._replace(plan=None, why=why)
