"""When to plan again: measured loads in, a new plan or None out.

1. Loads are averaged over `patience` observations, and over all since the last candidate.
2. If perfect balance under one of these means could pay for a move, a candidate is planned for it.
3. The candidate is tested on the observations that follow. It is taken when

       gain in the test * min(life, what is left of the run / length of the test) > time to move,

   so a gain is expected to last `life` times as long as it has lasted, at most to the end of the run.
4. It is dropped when it gains nothing, or too little in LONGEST of the run. Each one dropped doubles the patience:
   loads that change faster than a test lasts are averaged over. One taken sets the patience back to SHORTEST.
5. A change is made only if it can be undone within `max_loss` of the run. It is undone when just the time for that is
   left (`Account`). The price: a move that takes more than about half of `max_loss` of the run is never made.

Letters: L MoE layers, E experts, X experts of all layers end to end, R ranks, T observations.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.sparse import csr_array

from hmoe_megatron.placement.moves import columns, diff, traffic
from hmoe_megatron.placement.plan import PlacementPlan
from hmoe_megatron.placement.solver import InfeasiblePlan

SHORTEST = 8  # observations averaged, and tested: fewer are mostly noise
LONGEST = 0.05  # of the run: older loads are forgotten, and no test takes longer


class StepTimes:
    """What `plan.cost` predicts for a plan under loads tokens_TX, in the cost's unit.

    A layer takes as long as its slowest rank (`cost.predict`), a pipeline stage as long as its layers one after the
    other, a micro-batch as long as its slowest stage.
    """

    def __init__(self, plan: PlacementPlan):
        self._cost, speed_R = plan.cost, np.array([rank.speed for rank in plan.rank_specs])
        self._share_R, self._stage_L = speed_R / speed_R.sum(), np.array(plan.stages)
        expert, lo, hi, rank = np.concatenate([columns(layer.pieces) for layer in plan.layers], axis=1)
        layer = np.repeat(np.arange(len(plan.layers)), [len(at.widths) + at.cuts for at in plan.layers])
        first_L = np.cumsum([0] + [len(at.widths) for at in plan.layers])
        padded = -(-(hi - lo) // self._cost.width_tile) * self._cost.width_tile
        # Times of all ranks are one product: with what `by_rank` puts end to end for each expert.
        factors = np.concatenate([1 / speed_R[rank], padded / speed_R[rank], self._cost.travel(plan.rank_specs)[rank]])
        columns_X = np.concatenate([first_L[layer] + expert + n * first_L[-1] for n in range(3)])
        where = np.tile(layer * plan.ranks + rank, 3), columns_X
        self._factors = csr_array((factors, where), (len(plan.layers) * plan.ranks, 3 * first_L[-1]))

    def __call__(self, tokens_TX: np.ndarray) -> np.ndarray:
        """[T] time of a micro-batch."""
        return self._slowest_stage(self.by_rank(tokens_TX).max(axis=1))

    def balanced(self, tokens_TX: np.ndarray) -> np.ndarray:
        """[T] the same if each layer's work were shared by the ranks as their speeds are."""
        return self._slowest_stage(np.einsum("lrt,r->lt", self.by_rank(tokens_TX), self._share_R))

    def by_rank(self, tokens_TX: np.ndarray) -> np.ndarray:
        """[L, R, T] time of each rank in each layer."""
        amounts_TX = np.concatenate([*self._cost.compute(tokens_TX), tokens_TX], axis=1)
        return (self._factors @ amounts_TX.T).reshape(self._stage_L.size, self._share_R.size, -1)

    def _slowest_stage(self, time_LT: np.ndarray) -> np.ndarray:
        return np.max([time_LT[self._stage_L == stage].sum(axis=0) for stage in set(self._stage_L.tolist())], axis=0)


def moving_time(old: PlacementPlan, new: PlacementPlan, bytes_per_time: float, pause: float = 0.0) -> float:
    """What a change of plan takes: the pause, and the bytes of the rank that sends or receives most.

    bytes_per_time and pause are in the unit of the plan's cost. Raises as `diff` does.
    """
    most = max(amounts.max() for amounts in traffic(diff(old, new), new, max(old.ranks, new.ranks)))
    return pause + float(most) / bytes_per_time


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


class Choice:
    """A plan, its times, and the time of the way back from it to the first plan."""

    def __init__(self, plan: PlacementPlan, way_back: float):
        self.plan, self.way_back, self.times = plan, way_back, StepTimes(plan)


class Stretch:
    """Sum over the micro-batches of successive observations."""

    def __init__(self):
        self.total, self.micro_batches, self.observations = 0.0, 0, 0

    def add(self, amount: np.ndarray | float, micro_batches: int) -> None:
        self.total = self.total + micro_batches * amount
        self.micro_batches += micro_batches
        self.observations += 1


class ReplanPolicy:
    """The plan in force and when to change it. One object a run; the same observations give the same plans.

    first: the plan at the start. run: micro-batches that the expert-parallel group will process in all.
    replan(tokens_LE, plan in force): makes a plan with the widths, ranks, cost and stages of `first`.
    move_time(old, new), planning_time: what a change and a call of `replan` take, in the unit of the cost;
    move_time(first, first) is what the least change takes. max_loss, life: see above. hysteresis: share of the time in
    force that a candidate must be better by; only what it gains beyond that counts.
    ValueError for an argument out of range and for a plan of `replan` that is made for something else.
    """

    def __init__(
        self,
        first: PlacementPlan,
        run: int,
        replan: Callable[[list[np.ndarray], PlacementPlan], PlacementPlan],
        move_time: Callable[[PlacementPlan, PlacementPlan], float],
        planning_time: float = 0.0,
        max_loss: float = 0.015,
        life: float = 3.0,
        hysteresis: float = 0.005,
    ):
        least_price = move_time(first, first)
        _check(run >= 1, f"run {run}: give the number of micro-batches, at least 1")
        _check(planning_time >= 0, f"planning_time {planning_time}: give a time, at least 0")
        _check(least_price >= 0, f"move_time: {least_price} for no change; give a time, at least 0")
        _check(0 <= max_loss <= 1, f"max_loss {max_loss}: give a share from 0 to 1")
        _check(life > 0, f"life {life}: give a number above 0")
        _check(0 <= hysteresis <= 1, f"hysteresis {hysteresis}: give a share from 0 to 1")
        self.first, self.replan, self.move_time, self.planning_time = first, replan, move_time, planning_time
        self.life, self.keep = life, 1 - hysteresis
        self.account = Account(run, max_loss)
        self.calls = 0  # of `replan`
        self._experts_L = [len(layer.widths) for layer in first.layers]
        self._least_price = least_price + planning_time
        self._patience = SHORTEST
        self._first = self._now = Choice(first, way_back=0.0)
        self._candidate: Choice | None = None
        self._recent, self._loads = Stretch(), Stretch()

    @property
    def plan(self) -> PlacementPlan:
        """In force."""
        return self._now.plan

    def observe(self, tokens_LE: Sequence[np.ndarray], micro_batches: int = 1) -> PlacementPlan | None:
        """The plan to change to now, which from then on is in force, or None.

        tokens_LE: rows of each expert in one micro-batch, the mean over as many as have run since the last call. The
        same on all ranks that are to agree. ValueError for anything but finite loads of these experts, some above 0.
        """
        experts_L = [len(tokens_E) for tokens_E in tokens_LE]
        by_layer = f"loads of {experts_L!s:.80} experts by layer; give them for {self._experts_L!s:.80}"
        _check(experts_L == self._experts_L, f"tokens_LE: {by_layer}")
        _check(micro_batches >= 1, f"micro_batches {micro_batches}: give how many have run since the last call")
        tokens_TX = np.concatenate(tokens_LE, dtype=float)[None]
        is_load = tokens_TX.min() >= 0 and 0 < tokens_TX.sum() < np.inf
        _check(is_load, "tokens_LE: give finite loads of at least 0, and some above it")
        first, now = self._first.times, self._now.times(tokens_TX).item()
        self.account.book(micro_batches, first(tokens_TX).item(), now, first.balanced(tokens_TX).item())
        if self._now is not self._first and self.account.room < self._now.way_back:
            return self._change(self._first, self._now.way_back)
        if self._candidate is not None:
            self._gain.add(self.keep * now - self._candidate.times(tokens_TX).item(), micro_batches)
            return self._verdict()
        self._recent.add(tokens_TX, micro_batches)
        self._loads.add(tokens_TX, micro_batches)
        return self._look_for_candidate()

    def _look_for_candidate(self) -> None:
        """For the recent loads if they can pay for a move, as after a change of the loads; else for all."""
        if not self._long_enough(self._recent):
            return
        worth = [loads.total / loads.micro_batches for loads in (self._recent, self._loads) if self._could_pay(loads)]
        self._recent = Stretch()
        if worth or self._too_long(self._loads):
            self._loads = Stretch()
        if worth and self.account.room >= self._now.way_back + self.planning_time:
            self._plan(np.split(worth[0][0], np.cumsum(self._experts_L)[:-1]))

    def _could_pay(self, loads: Stretch) -> bool:
        """Whether perfect balance would pay for the least change."""
        times, mean_TX = self._now.times, loads.total / loads.micro_batches
        gain = self.keep * times(mean_TX).item() - times.balanced(mean_TX).item()
        return self._pays(gain * loads.micro_batches, loads, self._least_price)

    def _plan(self, tokens_LE: list[np.ndarray]) -> None:
        self.calls += 1
        self.account.spent += self.planning_time
        try:
            plan = self.replan(tokens_LE, self.plan)
        except InfeasiblePlan:
            plan = self.plan
        for name in ("widths", "rank_specs", "cost", "stages"):
            is_same = getattr(plan, name) == getattr(self.first, name)
            _check(is_same, f"replan: its plan does not have the {name} of the first")
        if _same(plan, self.plan):
            self._patience *= 2
            return
        self._price, self._gain = self.move_time(self.plan, plan), Stretch()
        self._candidate = self._first if _same(plan, self.first) else Choice(plan, self.move_time(plan, self.first))

    def _verdict(self) -> PlacementPlan | None:
        """Take the candidate, or None: it is dropped, or its test goes on."""
        gain = self._gain
        if not self._long_enough(gain):
            return None
        affordable = self.account.room >= self._price + self._candidate.way_back
        if affordable and self._pays(gain.total, gain, self._price):
            self._patience = SHORTEST
            return self._change(self._candidate, self._price)
        if gain.total <= 0 or self._too_long(gain):
            self._candidate = None
            self._patience *= 2
        return None

    def _pays(self, gain: float, over: Stretch, price: float) -> bool:
        return gain * min(self.life, self.account.left / over.micro_batches) > price

    def _long_enough(self, stretch: Stretch) -> bool:
        return stretch.observations >= (SHORTEST if self._too_long(stretch) else self._patience)

    def _too_long(self, stretch: Stretch) -> bool:
        return stretch.micro_batches >= LONGEST * self.account.run

    def _change(self, choice: Choice, price: float) -> PlacementPlan:
        self.account.spent += price
        self._now, self._candidate = choice, None
        self._recent, self._loads = Stretch(), Stretch()
        return choice.plan


def _check(right: bool, text: str) -> None:
    if not right:
        raise ValueError(f"policy: {text}")


def _same(plan: PlacementPlan, other: PlacementPlan) -> bool:
    return all(a.pieces == b.pieces for a, b in zip(plan.layers, other.layers, strict=True))
