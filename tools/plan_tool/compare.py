"""Plans for the same layers, ranks and loads beside each other."""

from dataclasses import dataclass

from hmoe_megatron.placement.plan import PlacementPlan
from hmoe_megatron.placement.profiles import FLOPS

MAX_LAYERS = 40  # rows of the table by layer; more lose their middle
_NAME = 26


@dataclass(frozen=True)
class Outcome:
    """What one plan gives. over_mean: slowest rank over the mean of all ranks, times summed over layers; gap: of the
    time to the bound that holds for all plans compared; cuts: of all layers; most_bytes: of any rank of any stage."""

    time: float
    over_mean: float
    gap: float
    cuts: int
    most_bytes: int
    over_cap: bool


def outcomes(plans: dict[str, PlacementPlan]) -> dict[str, Outcome]:
    """Name of a plan -> what it gives. The least of their bounds holds for all."""
    bound = min(plan.bound for plan in plans.values())
    return {name: _outcome(plan, bound) for name, plan in plans.items()}


def _outcome(plan: PlacementPlan, bound: float) -> Outcome:
    slowest = sum(max(layer.predicted.time) for layer in plan.layers)
    mean = sum(sum(layer.predicted.time) for layer in plan.layers) / plan.ranks
    return Outcome(
        time=plan.time,
        over_mean=slowest / mean if mean else 1.0,
        gap=max(plan.time / bound - 1, 0.0) if bound else 0.0,
        cuts=sum(layer.cuts for layer in plan.layers),
        most_bytes=max(plan.held_bytes().values()),
        over_cap=bool(plan.missing_bytes()),
    )


def comparison_table(plans: dict[str, PlacementPlan]) -> str:
    """A line for each plan, at most 100 columns."""
    seconds = list(plans.values())[-1].cost.unit != FLOPS.unit
    columns = [("time us" if seconds else "FLOPs", 14), ("max/mean", 12), ("gap", 12), ("cuts", 8), ("most GiB", 12)]
    head = " " * _NAME + "".join(f"{name:>{width}}" for name, width in columns)
    lines = [
        f"{name:<{_NAME}}{_time(of.time, seconds):>14}{of.over_mean:>12.4f}{of.gap:>12.2%}{of.cuts:>8}"
        f"{of.most_bytes / 2**30:>12.3f}{' over cap' if of.over_cap else ''}"
        for name, of in outcomes(plans).items()
    ]
    return "\n".join([head, *lines])


def _time(time: float, seconds: bool) -> str:
    return f"{1e6 * time:,.1f}" if seconds else f"{time:.3e}"


def layers_table(plans: dict[str, PlacementPlan]) -> str:
    """Slowest rank over the mean, a line for each layer and a column for each plan (named above it, by number)."""
    names = [f"  {number} {name}" for number, name in enumerate(plans, 1)]
    columns = "".join(f"{number:>10}" for number in range(1, len(plans) + 1))
    rows = []
    first = next(iter(plans.values()))
    for layer, *of_plans in zip(first.numbers, *(plan.layers for plan in plans.values()), strict=True):
        rows.append(f"{layer:>7}" + "".join(f"{of.predicted.over_mean:>10.4f}" for of in of_plans))
    if len(rows) > MAX_LAYERS:
        half = MAX_LAYERS // 2
        rows[half:-half] = [f"{'...':>7}  ({len(rows) - 2 * half} layers more)"]
    return "\n".join(["slowest rank over the mean, by layer:", *names, f"{'layer':>7}{columns}", *rows])
