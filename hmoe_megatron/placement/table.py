"""A plan as text: which rank holds what, and its share of FLOPs, parameters and tokens."""

from collections.abc import Sequence
from itertools import groupby

from hmoe_megatron.placement.plan import LayerPlan, PlacementPlan

MAX_COLUMNS = 100
MAX_ROWS = 16  # ranks of a layer shown; more lose their middle
_SHARES_WIDTH = 3 * 10


def plan_table(plan: PlacementPlan, layer: int | None = None) -> str:
    """The plan, or its layer with that index, as a table of at most 100 columns.

    A whole expert is its number, a piece is `5[0:96)`. Shares are percent of the sum over ranks; tokens count a cut
    expert's rows on each rank that computes them. Layers of the same plan in a row are one block. The last line
    of a block: slowest rank over the mean, cuts, the bound on it over the mean, and the gap between the two.
    """
    if layer is not None and not 0 <= layer < len(plan.layers):
        raise ValueError(f"layer {layer}: the plan has layers 0-{len(plan.layers) - 1}")
    blocks, first = [], 0
    for layer_plan, same in groupby(plan.layers):
        last = first + len(list(same)) - 1
        if layer is None:
            blocks.append(_block(f"layers {first}-{last}" if last > first else f"layer {first}", layer_plan))
        elif first <= layer <= last:
            blocks.append(_block(f"layer {layer}", layer_plan))
        first = last + 1
    return "\n\n".join(blocks)


def _block(name: str, plan: LayerPlan) -> str:
    shares = zip(*map(_percent, (plan.predicted.flops, plan.predicted.params, plan.predicted.tokens)), strict=True)
    room = MAX_COLUMNS - _SHARES_WIDTH - 7
    texts = [_pieces_text(rank, plan, room) for rank in range(plan.ranks)]
    width = max(6, *map(len, texts))
    rows = [f"{rank:>5}  {text:<{width}}{flops:>10.2f}{params:>10.2f}{tokens:>10.2f}"
            for rank, (text, (flops, params, tokens)) in enumerate(zip(texts, shares, strict=True))]
    if len(rows) > MAX_ROWS:
        half = MAX_ROWS // 2
        rows[half:-half] = [f"{'...':>5}  ({len(rows) - 2 * half} ranks more)"]
    head = f"{'rank':>5}  {'pieces':<{width}}{'FLOPs %':>10}{'params %':>10}{'tokens %':>10}"
    title = f"{name}: {len(plan.widths)} experts on {plan.ranks} ranks"
    return "\n".join([title, head, *rows, _summary(plan)])


def _summary(plan: LayerPlan) -> str:
    mean_flops = sum(plan.predicted.flops) / plan.ranks
    mean_time = sum(plan.predicted.time) / plan.ranks
    over_mean = f"{max(plan.predicted.flops) / mean_flops:.4f}" if mean_flops else "-"
    bound = f"{plan.predicted.bound / mean_time:.4f}" if mean_time else "-"
    cuts = f"{plan.cuts} cut" + ("s" if plan.cuts != 1 else "")
    return (f"max over mean of FLOPs {over_mean}, {cuts}; bound on the slowest rank {bound} of the mean, "
            f"gap {plan.predicted.gap:.2%}")


def _percent(amounts: Sequence[float]) -> list[float]:
    total = sum(amounts)
    return [100 * amount / total if total else 0.0 for amount in amounts]


def _pieces_text(rank: int, plan: LayerPlan, room: int) -> str:
    """Pieces of a rank in at most `room` columns; those without room are counted."""
    words = [f"{p.expert}" if p.width == plan.widths[p.expert] else f"{p.expert}[{p.lo}:{p.hi})"
             for p in plan.pieces[rank]]
    text = " ".join(words) or "-"
    shown = len(words)
    while len(text) > room:
        shown -= 1
        text = " ".join(words[:shown]) + f" +{len(words) - shown} more"
    return text
