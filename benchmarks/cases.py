"""Random layers, drawn alike by the planner's tests and by its benchmark: one seed, one layer."""

import random
from collections import Counter
from dataclasses import dataclass, replace

from hmoe_megatron.placement import CostModel, InfeasiblePlan, LayerPlan, Rank, plan_layer
from hmoe_megatron.placement.milp import any_that_fits
from hmoe_megatron.placement.problem import LayerProblem
from hmoe_megatron.placement.profiles import PROFILES

SLACK = (1.0, *[1.005] * 10, *[1.02] * 60, *[1.1] * 60, *[1.5] * 60)  # of caps over the bytes of some placement
MORE_NODES = 5_000


@dataclass(frozen=True)
class Case:
    """Arguments of plan_layer."""

    tokens_E: list[float]
    widths_E: list[int]
    ranks: list[Rank]
    cost: CostModel
    max_cuts: int
    cut_multiple: int = 1

    def plan(self) -> LayerPlan:
        return plan_layer(**vars(self))

    def problem(self) -> LayerProblem:
        return LayerProblem.of(self.tokens_E, self.widths_E, self.ranks, self.cost, self.max_cuts, self.cut_multiple)


def whole_layer(seed: int) -> Case:
    """2 to 16 experts, to be placed whole; on some the ranks differ in speed and neighbours."""
    draw = random.Random(seed)
    experts, ranks = draw.randint(2, 16), draw.randint(2, 8)
    cost = draw.choice([CostModel(), CostModel(PROFILES["h100"], hidden_size=1024)])
    unequal = draw.random() < 0.3
    return Case(
        tokens_E=[draw.lognormvariate(4, draw.choice([0.3, 1])) for _ in range(experts)],
        widths_E=[draw.randint(1, 3000) for _ in range(experts)],
        ranks=[Rank(node=r // 2, speed=draw.choice([1, 1, 1, 0.5])) if unequal else Rank() for r in range(ranks)],
        cost=cost,
        max_cuts=0,
    )


def capped_layer(seed: int) -> Case:
    """2 to 40 experts under caps that some placement, drawn at random, keeps: with a little room or with none."""
    draw = random.Random(seed)
    experts, ranks = draw.choice([draw.randint(2, 16), draw.randint(2, 40)]), draw.randint(2, 8)
    cost = CostModel(draw.choice([PROFILES["flops"], PROFILES["h100"]]), hidden_size=64)
    case = Case(
        tokens_E=[draw.choice([0.0, draw.lognormvariate(4, 1)]) for _ in range(experts)],
        widths_E=[draw.choice([draw.randint(1, 40), draw.randint(100, 3000)]) for _ in range(experts)],
        ranks=[],
        cost=cost,
        max_cuts=draw.choice([0, ranks - 1]),
        cut_multiple=draw.choice([1, 16]),
    )
    held, cuts = [Counter() for _ in range(ranks)], 0
    for e, width in enumerate(case.widths_E):
        inner = range(case.cut_multiple, width, case.cut_multiple)
        pieces = min(draw.choice([1, 1, 2, 3]), 1 + case.max_cuts - cuts, 1 + len(inner))
        ends = [0, *sorted(draw.sample(inner, pieces - 1)), width]
        for lo, hi in zip(ends, ends[1:], strict=False):
            held[draw.randrange(ranks)][e] += hi - lo
        cuts += pieces - 1
    piece_bytes_E, width_bytes_E = cost.memory(case.tokens_E)
    slack = draw.choice(SLACK)
    caps = [sum(int(piece_bytes_E[e]) + int(width_bytes_E[e]) * width for e, width in of.items()) for of in held]
    return replace(case, ranks=[Rank(bytes=int(cap * slack)) for cap in caps])


def under_caps(seed: int) -> str:
    """What the planner makes of capped_layer(seed): "kept", "broken", "missed" (HiGHS has a plan), "not found"."""
    case = capped_layer(seed)
    try:
        held_bytes = case.plan().predicted.bytes
    except InfeasiblePlan:
        few = len(case.widths_E) <= 16
        return "missed" if few and any_that_fits(case.problem(), MORE_NODES).held else "not found"
    return "broken" if any(b > rank.bytes for b, rank in zip(held_bytes, case.ranks, strict=True)) else "kept"
