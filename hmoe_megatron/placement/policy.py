"""When to plan again: measured loads in, a new plan or None out.

Loads are averaged over `patience` observations, and over all since the last candidate. When perfect balance under one
of these means could pay for a move, a candidate is planned for it and tested on the observations that follow. What it
gains there is the evidence. It is taken when

    gain in the test * min(life, what is left of the run / length of the test) > time to move,

so a gain is expected to last `life` times as long as it has lasted, at most to the end of the run. It is dropped when
it gains nothing, or too little in LONGEST of the run. Each one dropped doubles the patience: loads that change faster
than a test lasts are averaged over. One taken sets it back to SHORTEST.

`Account` bounds the loss: a change is made only if it can be undone within `max_loss` of the run, and undone when just
the time for that is left. The price: a move that takes more than about half of `max_loss` of the run is never made.
How much is gained is not guaranteed but measured (`simulate`).

Letters: L MoE layers, E experts, X experts of all layers end to end, T observations (here 1).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from hmoe_megatron.placement.account import Account
from hmoe_megatron.placement.plan import PlacementPlan
from hmoe_megatron.placement.solver import InfeasiblePlan
from hmoe_megatron.placement.step_times import StepTimes

SHORTEST = 8  # observations averaged, and tested: fewer are mostly noise
LONGEST = 0.05  # of the run: older loads are forgotten, and no test takes longer


class Choice:
    """A plan, its times, and the time of the way back from it to the first plan."""

    def __init__(self, plan: PlacementPlan, way_back: float):
        self.plan, self.way_back, self.times = plan, way_back, StepTimes(plan)


@dataclass
class Stretch:
    """Sum over the micro-batches of successive observations."""

    total: np.ndarray | float = 0.0
    micro_batches: int = 0
    observations: int = 0

    def add(self, amount: np.ndarray | float, micro_batches: int) -> None:
        self.total = self.total + micro_batches * amount
        self.micro_batches += micro_batches
        self.observations += 1

    @property
    def mean(self) -> np.ndarray | float:
        return self.total / self.micro_batches


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
        _check({
            f"run {run}: give the number of micro-batches, at least 1": run >= 1,
            f"planning_time {planning_time}: give a time, at least 0": planning_time >= 0,
            f"move_time: {least_price} for no change; give a time, at least 0": least_price >= 0,
            f"max_loss {max_loss}: give a share from 0 to 1": 0 <= max_loss <= 1,
            f"life {life}: give a number above 0": life > 0,
            f"hysteresis {hysteresis}: give a share from 0 to 1": 0 <= hysteresis <= 1,
        })
        self.first, self.replan, self.move_time, self.planning_time = first, replan, move_time, planning_time
        self.life, self.hysteresis = life, hysteresis
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
        tokens_TX = self._checked(tokens_LE, micro_batches)
        first, now = self._first.times, self._now.times(tokens_TX).item()
        self.account.book(micro_batches, first(tokens_TX).item(), now, first.balanced(tokens_TX).item())
        if self._now is not self._first and self.account.room < self._now.way_back:
            return self._change(self._first, self._now.way_back)
        if self._candidate is None:
            self._recent.add(tokens_TX, micro_batches)
            self._loads.add(tokens_TX, micro_batches)
            return self._look_for_candidate()
        self._gain.add((1 - self.hysteresis) * now - self._candidate.times(tokens_TX).item(), micro_batches)
        return self._verdict()

    def _look_for_candidate(self) -> None:
        """For the recent loads where they make it worth while, as after a change; else for all."""
        if not self._long_enough(self._recent):
            return
        worth = [loads.mean for loads in (self._recent, self._loads) if self._could_pay(loads)]
        self._recent = Stretch()
        if worth or self._too_long(self._loads):
            self._loads = Stretch()
        if worth and self.account.room >= self._now.way_back + self.planning_time:
            self._plan(np.split(worth[0][0], np.cumsum(self._experts_L)[:-1]))

    def _could_pay(self, loads: Stretch) -> bool:
        """Whether perfect balance would pay for the least change."""
        times = self._now.times
        gain = (1 - self.hysteresis) * times(loads.mean).item() - times.balanced(loads.mean).item()
        return self._pays(gain * loads.micro_batches, loads, self._least_price)

    def _plan(self, tokens_LE: list[np.ndarray]) -> None:
        self.calls += 1
        self.account.spent += self.planning_time
        try:
            plan = self.replan(tokens_LE, self.plan)
        except InfeasiblePlan:
            plan = self.plan
        _check({f"replan: its plan has not the {name} of the first": getattr(plan, name) == getattr(self.first, name)
                for name in ("widths", "rank_specs", "cost", "stages")})
        if _same(plan, self.plan):
            self._patience *= 2
            return
        self._price, self._gain = self.move_time(self.plan, plan), Stretch()
        self._candidate = self._first if _same(plan, self.first) else Choice(plan, self.move_time(plan, self.first))

    def _verdict(self) -> PlacementPlan | None:
        """Take the candidate, or None: it is dropped, or its test goes on."""
        gain, price, way_back = self._gain, self._price, self._candidate.way_back
        if not self._long_enough(gain):
            return None
        if self._pays(gain.total, gain, price) and self.account.room >= price + way_back:
            self._patience = SHORTEST
            return self._change(self._candidate, price)
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

    def _checked(self, tokens_LE: Sequence[np.ndarray], micro_batches: int) -> np.ndarray:
        experts_L = [len(tokens_E) for tokens_E in tokens_LE]
        _check({
            f"tokens_LE: loads of {experts_L!s:.80} experts by layer; give them for {self._experts_L!s:.80}":
                experts_L == self._experts_L,
            f"micro_batches {micro_batches}: give how many have run since the last call, at least 1":
                micro_batches >= 1,
        })
        tokens_X = np.concatenate(tokens_LE, dtype=float)
        _check({"tokens_LE: give finite loads of at least 0, and some above it":
                tokens_X.min() >= 0 and 0 < tokens_X.sum() < np.inf})
        return tokens_X[None]


def _check(rules: dict[str, bool]) -> None:
    if broken := [rule for rule, kept in rules.items() if not kept]:
        raise ValueError("policy: " + "; ".join(broken))


def _same(plan: PlacementPlan, other: PlacementPlan) -> bool:
    return all(a.pieces == b.pieces for a, b in zip(plan.layers, other.layers, strict=True))
