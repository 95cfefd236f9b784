"""A plan for measured loads, near the one in force, that keeps to the room which every rank has in each layer.

Letters: L MoE layers, E experts, X experts of all layers end to end.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from hmoe_megatron.placement.cost import CostModel
from hmoe_megatron.placement.plan import LayerPlan, PlacementPlan
from hmoe_megatron.placement.planner import plan_layer, predicted_layer
from hmoe_megatron.placement.rank_assignment import relabel
from hmoe_megatron.placement.solver import InfeasiblePlan

LEAST_GAIN = 0.005  # of a layer's time: less is not worth another layout


def proposed_plan(
    now: PlacementPlan,
    tokens_LE: Sequence[np.ndarray],
    most: Mapping[int, int],
    max_cuts: int | None,
    cut_multiple: int,
) -> PlacementPlan:
    """``now`` with another layout for each layer that it would make faster under loads tokens_LE by LEAST_GAIN.

    tokens_LE: in the unit of ``now`` (`rows_like`). most: decoder layer -> width that a rank has room for. A layer that
    no other layout fits in that room stays as it is, all of them where the ranks' own bytes would not hold the plan:
    it could not be read again. Pure: the same on every rank.
    """
    layers = [
        _proposed(now, number, layer, tuple(map(float, tokens_E)), most[number], max_cuts, cut_multiple)
        for number, layer, tokens_E in zip(now.numbers, now.layers, tokens_LE, strict=True)
    ]
    plan = replace(now, layers=tuple(layers))
    return now if plan.missing_bytes() else plan


def rows_like(plan: PlacementPlan, tokens_LE: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Tokens of a window as the rows of one micro-batch that ``plan`` was made for: each layer's with the sum it has
    there. Costs of a hardware profile are not proportional to rows, so sums of a window would make cuts look free."""
    return [
        np.asarray(tokens_E, dtype=float) * (sum(layer.tokens) / max(np.sum(tokens_E), 1.0))
        for layer, tokens_E in zip(plan.layers, tokens_LE, strict=True)
    ]


def _proposed(now, number, layer: LayerPlan, tokens, most: int, max_cuts, cut_multiple: int) -> LayerPlan:
    under = predicted_layer(layer.pieces, layer.widths, tokens, now.rank_specs, now.cost)
    # A cost in which a width unit is what a rank has room for, and rows take none.
    in_units = CostModel(now.cost.profile, now.cost.hidden_size, live_micro_batches=0.0)
    cap = most * int(in_units.memory([1.0])[1][0])
    ranks = [replace(rank, bytes=cap) for rank in now.rank_specs]
    try:
        found = plan_layer(tokens, layer.widths, ranks, in_units, max_cuts, cut_multiple)
    except InfeasiblePlan:
        return under
    (found,) = relabel([found], [layer], ranks, (), cut_multiple, [number])
    found = predicted_layer(found.pieces, found.widths, tokens, now.rank_specs, now.cost, under.predicted.bound)
    return found if max(found.predicted.time) < max(under.predicted.time) * (1 - LEAST_GAIN) else under
