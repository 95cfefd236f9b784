"""What plans take: one micro-batch under many loads at once, and a change from plan to plan.

Letters: T loads, L MoE layers, X experts of all layers end to end, R ranks.
"""

import numpy as np
from scipy.sparse import csr_array

from hmoe_megatron.placement.moves import columns, diff, traffic
from hmoe_megatron.placement.plan import PlacementPlan


class StepTimes:
    """What `plan.cost` predicts for a plan under loads tokens_TX, in the cost's unit.

    A layer takes as long as its slowest rank (`cost.predict`), a pipeline stage as long as its layers one after the
    other, a micro-batch as long as its slowest stage.
    """

    def __init__(self, plan: PlacementPlan):
        self._cost, speed_R = plan.cost, np.array([rank.speed for rank in plan.rank_specs])
        self._share_R = speed_R / speed_R.sum()
        self._stage_L = np.array(plan.stages)
        expert, lo, hi, rank = np.concatenate([columns(layer.pieces) for layer in plan.layers], axis=1)
        layer = np.repeat(np.arange(len(plan.layers)), [len(at.widths) + at.cuts for at in plan.layers])
        first_L = np.cumsum([0] + [len(at.widths) for at in plan.layers])
        padded = -(-(hi - lo) // self._cost.width_tile) * self._cost.width_tile
        # Times of all ranks are one product: with what `by_rank` puts end to end for each expert.
        factors = np.concatenate([1 / speed_R[rank], padded / speed_R[rank], self._cost.travel(plan.rank_specs)[rank]])
        expert_X, experts = first_L[layer] + expert, first_L[-1]
        where = np.tile(layer * plan.ranks + rank, 3), np.concatenate([expert_X + n * experts for n in range(3)])
        self._factors = csr_array((factors, where), (len(plan.layers) * plan.ranks, 3 * experts))

    def __call__(self, tokens_TX: np.ndarray) -> np.ndarray:
        """[T] time of a micro-batch."""
        return self._slowest_stage(self.by_rank(tokens_TX).max(axis=1))

    def balanced(self, tokens_TX: np.ndarray) -> np.ndarray:
        """[T] the same if each layer's work were shared by the ranks as their speeds are."""
        return self._slowest_stage(np.einsum("lrt,r->lt", self.by_rank(tokens_TX), self._share_R))

    def by_rank(self, tokens_TX: np.ndarray) -> np.ndarray:
        """[L, R, T] time of each rank in each layer."""
        per_piece_TX, per_width_TX = self._cost.compute(tokens_TX)
        amounts_TX = np.concatenate([per_piece_TX, per_width_TX, tokens_TX], axis=1)
        return (self._factors @ amounts_TX.T).reshape(self._stage_L.size, self._share_R.size, -1)

    def _slowest_stage(self, time_LT: np.ndarray) -> np.ndarray:
        return np.max([time_LT[self._stage_L == stage].sum(axis=0) for stage in set(self._stage_L.tolist())], axis=0)


def moving_time(old: PlacementPlan, new: PlacementPlan, bytes_per_time: float, pause: float = 0.0) -> float:
    """What a change of plan takes: the pause, and the bytes of the rank that sends or receives most.

    bytes_per_time and pause are in the unit of the plan's cost. Raises as `diff` does.
    """
    most = max(amounts.max() for amounts in traffic(diff(old, new), new, max(old.ranks, new.ranks)))
    return pause + float(most) / bytes_per_time
