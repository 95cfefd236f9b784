"""When to plan again: measured loads in, a new plan or None out.

The loads of the last observations are averaged. When what imbalance cost in them would, over as long a life as can be
expected, pay for a move, a candidate is planned and tested on the observations that follow: what it would have gained
there is its evidence. It is taken when that gain, times `life`, pays for the move ("expected to last `life` times as
long as it has lasted", and at most to the end of the run), and dropped when it is not ahead. Each dropped candidate
doubles the number of observations before the next verdict, so loads that change faster are averaged over.
An account of time spent, moves and planning included, against the time of staying with the first plan decides what may
be risked: a move is made only if, with the way back, it leaves the account within `allowance` of the run, and when the
account falls so far that just the way back is left, the way back is taken.

Guaranteed, whatever the loads: the run takes at most 1 + allowance times what staying takes, plus what one observation
loses beyond `_reserve`. Times are those the cost model predicts for the measured loads, and the rest of the run is
taken to be, on average, no faster with the first plan than the fastest observation so far. The price of the guarantee:
a move that takes more than about half the allowance of the run (there and back) is never made. How much is gained is
not guaranteed but measured, see `simulate`.

Letters: L MoE layers, E experts, X experts of all layers end to end, T observations, R ranks.
"""

import math
from collections.abc import Callable, Sequence

import numpy as np
from scipy.sparse import csr_array

from hmoe_megatron.placement.moves import columns, diff, traffic
from hmoe_megatron.placement.plan import PlacementPlan
from hmoe_megatron.placement.solver import InfeasiblePlan

SHORTEST = 8  # observations averaged and tested at least: fewer are mostly noise
LONGEST = 0.05  # of the run: older loads are forgotten, a candidate that has not paid by then is dropped


class StepTimes:
    """Time of one micro-batch under a plan, for many loads at once. A layer takes as long as its slowest rank, a
    pipeline stage the sum of its layers, a micro-batch as long as the slowest stage."""

    def __init__(self, plan: PlacementPlan):
        cost, ranks, layers = plan.cost, plan.rank_specs, plan.layers
        first_L = np.cumsum([0] + [len(layer.widths) for layer in layers])
        rows = [np.stack([first_L[n] + expert, hi - lo, rank, np.full_like(rank, n * plan.ranks)])
                for n, layer in enumerate(layers) for expert, lo, hi, rank in [columns(layer.pieces)]]
        expert, width, rank, layer = np.concatenate(rows, axis=1)
        speed_R = np.array([spec.speed for spec in ranks])

        def matrix(values):  # [L * R, X]
            return csr_array((values, (layer + rank, expert)), (len(layers) * plan.ranks, first_L[-1]))

        padded = -(-width // cost.width_tile) * cost.width_tile
        self._per_piece, self._per_width = matrix(1 / speed_R[rank]), matrix(padded / speed_R[rank])
        self._per_row = matrix(cost.travel(ranks)[rank])
        self._cost, self._share_R = cost, speed_R / speed_R.sum()
        self._layers_by_stage = [np.flatnonzero(np.array(plan.stages) == stage) for stage in sorted(set(plan.stages))]

    def by_rank(self, tokens_TX: np.ndarray) -> np.ndarray:
        """[L, R, T]."""
        per_piece_TX, per_width_TX = self._cost.compute(tokens_TX)
        time = self._per_width @ per_width_TX.T
        if self._cost.profile.launch_s:
            time += self._per_piece @ per_piece_TX.T
        if self._per_row.data.any():
            time += self._per_row @ tokens_TX.T
        return time.reshape(-1, self._share_R.size, len(tokens_TX))

    def __call__(self, tokens_TX: np.ndarray) -> np.ndarray:
        """[T]."""
        return self._slowest_stage(self.by_rank(tokens_TX).max(axis=1))

    def balanced(self, tokens_TX: np.ndarray) -> np.ndarray:
        """[T] if the same work were shared by the ranks as their speeds are: about the best that a plan can do."""
        return self._slowest_stage(np.einsum("lrt,r->lt", self.by_rank(tokens_TX), self._share_R))

    def _slowest_stage(self, time_LT: np.ndarray) -> np.ndarray:
        return np.max([time_LT[members].sum(axis=0) for members in self._layers_by_stage], axis=0)


def moving_time(old: PlacementPlan, new: PlacementPlan, bytes_per_s: float, pause: float) -> float:
    """What a change of plan takes: the pause, and the bytes of the rank that sends or receives most."""
    most = max(amounts.max() for amounts in traffic(diff(old, new), new.cost, max(old.ranks, new.ranks), new.stages))
    return pause + float(most) / bytes_per_s


class ReplanPolicy:
    """The plan in force, and the account. One object a run; the same observations give the same plans on every rank.

    first: plan at the start; run: micro-batches that each expert-parallel group will process in all. replan(tokens_LE,
    plan in force) makes a plan; move_time(old, new) is what it takes to change, planning_time what `replan` takes, both
    in the unit of the plan's cost. allowance: share of the run's time that may be lost, see the top of the file. life:
    how many times as long as it has lasted a gain is expected to last. hysteresis: share of the time in force that a
    candidate must be better by; only what it gains beyond that is counted.
    """

    def __init__(
        self,
        first: PlacementPlan,
        run: int,
        replan: Callable[[list[np.ndarray], PlacementPlan], PlacementPlan],
        move_time: Callable[[PlacementPlan, PlacementPlan], float],
        planning_time: float = 0.0,
        allowance: float = 0.015,
        life: float = 3.0,
        hysteresis: float = 0.005,var='A'
    ):
        self.var=var
        self.first, self.run, self.replan, self.move_time = first, run, replan, move_time
        self.planning_time, self.allowance, self.life, self.hysteresis = planning_time, allowance, life, hysteresis
        self.stay = self.spent = self.moving = self.planning = 0.0
        self.done, self.observations, self.calls = 0, 0, 0
        self._fastest, self._worst_loss = math.inf, 0.0
        self._offsets = np.cumsum([len(layer.widths) for layer in first.layers])[:-1]
        self._first_times = StepTimes(first)
        self._price = move_time(first, first)  # of the last candidate; before that of a move of nothing
        self._patience = SHORTEST
        self._in_force(first, self._first_times, back=0.0)

    def observe(self, tokens_LE: Sequence[np.ndarray], micro_batches: int = 1) -> PlacementPlan | None:
        """The plan to change to now, which from then on is in force, or None.

        tokens_LE: rows of each expert in one micro-batch, the mean over as many as have run since the last call.
        """
        tokens_TX, n = np.concatenate(tokens_LE, dtype=float)[None], micro_batches
        stay, now = (float(times(tokens_TX)[0]) * n for times in (self._first_times, self._times))
        self.done, self.observations = self.done + n, self.observations + 1
        self.stay, self.spent = self.stay + stay, self.spent + now
        self._fastest, self._worst_loss = min(self._fastest, stay / n), max(self._worst_loss, now - stay)
        if self.plan is not self.first and self._room() < self._back:
            self._patience *= 2
            return self._change(self.first, self._first_times, self._back, back=0.0)
        self._sum_TX, self._averaged, self._block = self._sum_TX + n * tokens_TX, self._averaged + n, self._block + 1
        if self._candidate:
            candidate = float(self._candidate_times(tokens_TX)[0]) * n
            self._worst_loss = max(self._worst_loss, candidate - stay)
            self._gain += (1 - self.hysteresis) * now - candidate
            self._tested, self._test = self._tested + n, self._test + 1
            return self._verdict()
        if self._long_enough(self._block, self._averaged):
            mean_TX = self._sum_TX / self._averaged
            gain = (1 - self.hysteresis) * self._times(mean_TX)[0] - self._times.balanced(mean_TX)[0]
            if self._pays(gain * self._averaged, self._averaged, self._price + self.planning_time):
                if self._room() >= self._back + self.planning_time:
                    self._plan(mean_TX)
            if self._candidate or self._averaged >= LONGEST * self.run:
                self._forget()
        return None

    def _room(self) -> float:
        """What may still be lost: the allowance of the run, less the account and a reserve for one observation."""
        whole_run = self.stay + max(self.run - self.done, 0) * self._fastest
        reserve = max(self._worst_loss, self.stay / self.observations)
        return self.allowance * whole_run - (self.spent - self.stay) - reserve

    def _pays(self, gain: float, micro_batches: int, price: float) -> bool:
        """Whether what was gained in so many micro-batches will, over its expected life, pay the price."""
        return gain * min(self.life, max(self.run - self.done, 0) / micro_batches) > price

    def _long_enough(self, observations: int, micro_batches: int) -> bool:
        return observations >= self._patience or observations >= SHORTEST and micro_batches >= LONGEST * self.run

    def _plan(self, mean_TX: np.ndarray) -> None:
        self.calls, self.planning = self.calls + 1, self.planning + self.planning_time
        self.spent += self.planning_time
        try:
            candidate = self.replan(np.split(mean_TX[0], self._offsets), self.plan)
        except InfeasiblePlan:
            candidate = self.plan
        if [layer.pieces for layer in candidate.layers] == [layer.pieces for layer in self.plan.layers]:
            self._patience *= 2
            return
        self._candidate, self._candidate_times = candidate, StepTimes(candidate)
        self._price = self.move_time(self.plan, candidate)
        self._gain, self._tested, self._test = 0.0, 0, 0

    def _verdict(self) -> PlacementPlan | None:
        if not self._long_enough(self._test, self._tested):
            return None
        if self._pays(self._gain, self._tested, self._price):
            back = self.move_time(self._candidate, self.first)
            if self._price + back <= self._room():
                self._patience = {'A':SHORTEST,'B':self._patience,'C':max(SHORTEST,self._patience//2)}[self.var]
                return self._change(self._candidate, self._candidate_times, self._price, back)
        if self._gain <= 0 or self._tested >= LONGEST * self.run:
            self._candidate = None
            self._patience *= 2
        return None

    def _change(self, plan: PlacementPlan, times: StepTimes, price: float, back: float) -> PlacementPlan:
        self.spent, self.moving = self.spent + price, self.moving + price
        self._in_force(plan, times, back)
        return plan

    def _in_force(self, plan: PlacementPlan, times: StepTimes, back: float) -> None:
        """back: time to return to the first plan."""
        self.plan, self._times, self._back = plan, times, back
        self._candidate = None
        self._forget()

    def _forget(self) -> None:
        self._sum_TX, self._averaged, self._block = 0.0, 0, 0
