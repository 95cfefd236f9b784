"""A plan as text: which rank holds what, and what that costs it."""

from collections.abc import Sequence
from itertools import groupby

from hmoe_megatron.placement.plan import LayerPlan, PlacementPlan
from hmoe_megatron.placement.profiles import FLOPS
from hmoe_megatron.widths import ranges_text

MAX_COLUMNS = 100
MAX_BLOCKS = 3  # of layers shown rank by rank
MAX_ROWS = 16  # ranks of a layer shown; more lose their middle
_COLUMN = 10


def plan_table(plan: PlacementPlan | LayerPlan, layer: int | None = None) -> str:
    """The plan, that decoder layer of it, or the plan of one layer under FLOPs, as a table of at most 100 columns.

    A whole expert is its number, a piece is `5[0:96)`. Percent are of the sum over ranks; tokens count a cut expert's
    rows on each rank that computes them; with a hardware profile, microseconds and MiB are predicted. Layers in a row
    that differ in nothing but which rank is which are one block, of the first one's ranks; of many blocks the later
    ones are one line. The last line of a block: slowest rank over the mean, cuts, the bound on it over the mean, and
    the gap between the two.
    """
    if isinstance(plan, LayerPlan):
        plan = PlacementPlan((plan,))
    if layer is not None:
        return _block(f"layer {layer}", plan.layers[plan.index(layer)], plan.cost.unit)
    blocks, first = [], 0
    for _, same in groupby(plan.layers, key=lambda of: (of.widths, of.tokens, sorted(of.pieces))):
        layers = list(same)
        numbers = plan.numbers[first : first + len(layers)]
        name = f"layers {ranges_text(numbers)}" if len(layers) > 1 else f"layer {numbers[0]}"
        if any(other.pieces != layers[0].pieces for other in layers):
            name += ", ranks in another order in each"
        blocks.append((name, layers[0]))
        first += len(layers)
    texts = [_block(name, layer_plan, plan.cost.unit) for name, layer_plan in blocks[:MAX_BLOCKS]]
    texts += [
        f"{name}: max/mean {_over_mean(of)}, {_cuts(of)}, gap {of.predicted.gap:.2%}"
        for name, of in blocks[MAX_BLOCKS:]
    ]
    return "\n\n".join(texts[:MAX_BLOCKS]) + "".join("\n" + text for text in texts[MAX_BLOCKS:])


def _block(name: str, plan: LayerPlan, unit: str) -> str:
    columns = _columns(plan, unit)
    room = MAX_COLUMNS - _COLUMN * len(columns) - 7
    texts = [_pieces_text(rank, plan, room) for rank in range(plan.ranks)]
    width = max(6, *map(len, texts))
    rows = [
        f"{rank:>5}  {text:<{width}}" + "".join(f"{value:>{_COLUMN},.2f}" for value in values)
        for rank, (text, *values) in enumerate(zip(texts, *columns.values(), strict=True))
    ]
    if len(rows) > MAX_ROWS:
        half = MAX_ROWS // 2
        rows[half:-half] = [f"{'...':>5}  ({len(rows) - 2 * half} ranks more)"]
    head = f"{'rank':>5}  {'pieces':<{width}}" + "".join(f"{name:>{_COLUMN}}" for name in columns)
    title = f"{name}: {len(plan.widths)} experts on {plan.ranks} ranks"
    return "\n".join([title, head, *rows, _summary(plan, unit)])


def _columns(plan: LayerPlan, unit: str) -> dict[str, list[float]]:
    """Heading -> number of each rank."""
    of = plan.predicted
    if unit == FLOPS.unit:
        return {"FLOPs %": _percent(of.flops), "params %": _percent(of.params), "tokens %": _percent(of.tokens)}
    return {
        "us": [1e6 * time for time in of.time],
        "FLOPs %": _percent(of.flops),
        "tokens %": _percent(of.tokens),
        "MiB": [held / 2**20 for held in of.bytes],
    }


def _summary(plan: LayerPlan, unit: str) -> str:
    mean = sum(plan.predicted.time) / plan.ranks
    bound = f"{plan.predicted.bound / mean:.4f}" if mean else "-"
    what = "FLOPs" if unit == FLOPS.unit else "time"
    return (
        f"max over mean of {what} {_over_mean(plan)}, {_cuts(plan)}; bound on the slowest rank {bound} of the "
        f"mean, gap {plan.predicted.gap:.2%}"
    )


def _over_mean(plan: LayerPlan) -> str:
    return f"{plan.predicted.over_mean:.4f}" if any(plan.predicted.time) else "-"


def _cuts(plan: LayerPlan) -> str:
    return f"{plan.cuts} cut" + "s" * (plan.cuts != 1)


def _percent(amounts: Sequence[float]) -> list[float]:
    total = sum(amounts)
    return [100 * amount / total if total else 0.0 for amount in amounts]


def _pieces_text(rank: int, plan: LayerPlan, room: int) -> str:
    """Pieces of a rank in at most `room` columns; those without room are counted."""
    words = [
        f"{p.expert}" if p.width == plan.widths[p.expert] else f"{p.expert}[{p.lo}:{p.hi})" for p in plan.pieces[rank]
    ]
    text = " ".join(words) or "-"
    shown = len(words)
    while len(text) > room:
        shown -= 1
        text = " ".join(words[:shown]) + f" +{len(words) - shown} more"
    return text
