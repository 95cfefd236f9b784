"""What other methods give for the same layers, ranks and loads: to compare with, never to train with."""

import contextlib
import heapq
from collections.abc import Sequence

from hmoe_megatron.placement.plan import PlacementPlan
from hmoe_megatron.placement.planner import contiguous_plan, plan_model, whole_plan
from hmoe_megatron.placement.solver import InfeasiblePlan

CONTIGUOUS = "contiguous"
EPLB_TOKENS, EPLB_WORK = "EPLB, by tokens", "EPLB, by tokens x width"
WHOLE = "planned, whole experts"


def equal_counts(weights_E: Sequence[float], ranks: int) -> list[int]:
    """Rank [E] of each expert by EPLB's balanced packing: the heaviest first, each to the lightest rank with room.

    Every rank has room for ceil(E / ranks). Of EPLB (github.com/deepseek-ai/EPLB) this is what is left without copies
    of experts, which in training would have to be kept equal, and without groups of experts.
    """
    room, owner_E = -(-len(weights_E) // ranks), [0] * len(weights_E)
    lightest = [(0.0, rank, 0) for rank in range(ranks)]
    for e in sorted(range(len(weights_E)), key=lambda e: (-weights_E[e], e)):
        weight, rank, held = heapq.heappop(lightest)
        owner_E[e] = rank
        if held + 1 < room:
            heapq.heappush(lightest, (weight + weights_E[e], rank, held + 1))
    return owner_E


def baselines(plan: PlacementPlan) -> dict[str, PlacementPlan]:
    """Name -> plan by another method for what `plan` was made for; `WHOLE` where `plan` cuts and the caps allow it."""
    tokens_LE = [layer.tokens for layer in plan.layers]
    same = plan.widths, plan.rank_specs, tokens_LE, plan.cost, plan.stages, plan.numbers

    def by_tokens(tokens_E, _):
        return equal_counts(tokens_E, plan.ranks)

    def by_work(tokens_E, widths_E):
        return equal_counts([m * F for m, F in zip(tokens_E, widths_E, strict=True)], plan.ranks)

    found = {
        CONTIGUOUS: contiguous_plan(*same),
        EPLB_TOKENS: whole_plan(by_tokens, *same),
        EPLB_WORK: whole_plan(by_work, *same),
    }
    if any(layer.cuts for layer in plan.layers):
        with contextlib.suppress(InfeasiblePlan):
            found[WHOLE] = plan_model(
                tokens_LE, plan.widths, plan.rank_specs, plan.cost, 0, stages=plan.stages, numbers=plan.numbers
            )
    return found
