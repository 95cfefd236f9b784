"""A layer's plans as PNG: the ranks as stacked bars of their pieces, with the mean and the caps."""

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from hmoe_megatron.placement.cost import piece_times
from hmoe_megatron.placement.plan import LayerPlan, PlacementPlan
from hmoe_megatron.tools.report.drawing import GREY, NARROW_TO_WIDE, STYLE, VERMILLION, png

LABELLED = 24  # ranks whose pieces have room for a name
LEAST_SHARE = 0.035  # of the axis: a lower piece has no room for its name
MARGIN = 1.08  # of the axes over what is tallest
HATCH = "////"  # of a piece of an expert that is cut


def draw_plans(plans: dict[str, PlacementPlan], layer: int) -> bytes:
    """Predicted time of a decoder layer under each plan, and its bytes where a rank has a cap; the last plan last."""
    with matplotlib.rc_context(matplotlib.rcParamsDefault | STYLE):
        return png(plans_figure(plans, layer))


def plans_figure(plans: dict[str, PlacementPlan], layer: int) -> Figure:
    last = list(plans.values())[-1]
    index = last.index(layer)
    capped = any(rank.bytes is not None for rank in last.rank_specs)
    figure = Figure(figsize=(6.5 * len(plans), 5.6 + 4.2 * capped), layout="constrained")
    axes_NP = figure.subplots(1 + capped, len(plans), squeeze=False, sharey="row", sharex=True)
    slowest, fullest = (
        max(max(getattr(plan.layers[index].predicted, what)) for plan in plans.values()) for what in ("time", "bytes")
    )
    scale, unit = _unit(slowest, last.cost.unit)
    sharing = last.stages.count(last.stages[index])
    caps = np.array([np.nan if rank.bytes is None else rank.bytes / sharing for rank in last.rank_specs])
    for axes_N, (name, plan) in zip(axes_NP.T, plans.items(), strict=True):
        _times(axes_N[0], name, plan, layer, scale, top=MARGIN * slowest * scale or 1.0)
        if capped:
            _bytes(axes_N[1], plan, layer, caps, sharing, top=MARGIN * max(fullest, np.nanmax(caps)))
        axes_N[-1].set_xlabel("expert-parallel rank")
    axes_NP[0, 0].set_ylabel(f"predicted {unit} a micro-batch")
    if capped:
        axes_NP[1, 0].set_ylabel("GiB of this layer's experts")
    widths = sorted(set(last.layers[index].widths))
    if len(widths) > 1:
        colour = ScalarMappable(Normalize(widths[0], widths[-1]), NARROW_TO_WIDE)
        figure.colorbar(colour, ax=axes_NP[:, -1], label="width of the expert").ax.grid(False)
    entries = dict(zip(*reversed(axes_NP[-1, 0].get_legend_handles_labels()), strict=True))
    entries |= dict(zip(*reversed(axes_NP[0, 0].get_legend_handles_labels()), strict=True))
    if any(plan.layers[index].cuts for plan in plans.values()):
        entries["piece of a cut expert"] = Patch(facecolor="white", edgecolor=GREY, hatch=HATCH)
    figure.legend(entries.values(), entries.keys(), loc="outside lower center", ncols=len(entries))
    return figure


def _times(axes: Axes, name: str, plan: PlacementPlan, layer: int, scale: float, top: float) -> None:
    of = plan.layers[plan.index(layer)]
    times = piece_times(of.pieces, of.tokens, plan.cost, plan.rank_specs)
    _bars(axes, of, [[time * scale for time in held] for held in times], top)
    mean = sum(of.predicted.time) / of.ranks
    axes.axhline(mean * scale, color=VERMILLION, linewidth=1.6, linestyle="--", label="mean of the ranks", zorder=4)
    over = f"slowest over mean {max(of.predicted.time) / mean:.3f}" if mean else "no tokens"
    axes.set_title(f"{name}, layer {layer}: {over}, {of.cuts} cut{'s' * (of.cuts != 1)}")


def _bytes(axes: Axes, plan: PlacementPlan, layer: int, caps: np.ndarray, sharing: int, top: float) -> None:
    of = plan.layers[plan.index(layer)]
    piece_bytes_E, width_bytes_E = plan.cost.memory(of.tokens)
    _bars(
        axes,
        of,
        [[(piece_bytes_E[p.expert] + width_bytes_E[p.expert] * p.width) / 2**30 for p in held] for held in of.pieces],
        top / 2**30,
    )
    axes.hlines(
        caps / 2**30,
        np.arange(of.ranks) - 0.45,
        np.arange(of.ranks) + 0.45,
        color=VERMILLION,
        linewidth=2,
        label="cap of a rank" + f" / the {sharing} layers of the stage" * (sharing > 1),
        zorder=4,
    )


def _bars(axes: Axes, of: LayerPlan, heights: list[list[float]], top: float) -> None:
    """A bar of each rank, its pieces on each other in their order; top: of the axis."""
    widths = of.widths
    colour = ScalarMappable(Normalize(min(widths), max(max(widths), min(widths) + 1)), NARROW_TO_WIDE)
    few = of.ranks <= LABELLED
    for rank, (pieces, held) in enumerate(zip(of.pieces, heights, strict=True)):
        bottoms = np.cumsum([0.0, *held])
        for piece, height, bottom in zip(pieces, held, bottoms, strict=False):
            face = colour.to_rgba(widths[piece.expert])
            axes.bar(
                rank,
                height,
                0.9,
                bottom,
                color=face,
                edgecolor="white",
                linewidth=0.8 if few else 0,
                hatch=HATCH if piece.width < widths[piece.expert] else None,
            )
            if few and height > LEAST_SHARE * top:
                dark = sum(face[:3]) < 1.5
                axes.text(
                    rank,
                    bottom + height / 2,
                    piece.expert,
                    ha="center",
                    va="center",
                    fontsize=9,
                    color="white" if dark else "black",
                )
    axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
    axes.grid(axis="x", visible=False)
    axes.set(xlim=(-0.6, of.ranks - 0.4), ylim=(0, top))


def _unit(most: float, unit: str) -> tuple[float, str]:
    """(factor, name): of times up to `most`."""
    units = [(1e3, "ms"), (1e6, "us")] if unit == "s" else [(1e-12, "TFLOPs"), (1e-9, "GFLOPs"), (1e-6, "MFLOPs")]
    return next((u for u in units if most * u[0] >= 1), units[-1])
