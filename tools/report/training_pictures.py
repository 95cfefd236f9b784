"""The pictures of a run over its iterations; the docstring of each is its caption."""

from matplotlib.figure import Figure

from hmoe_megatron.config import LOSS_NAMES
from hmoe_megatron.tools.report import drawing
from hmoe_megatron.tools.report.run_files import Run
from hmoe_megatron.tools.report.scalars import TRAINING, VALIDATION

NOISE = 1.2  # the axis of balances reaches this far at least, for a few percent come and go with every step
BALANCE_LOOKS = {
    "time_balance": ("measured expert time", drawing.VERMILLION, "-"),
    "token_balance": ("tokens", drawing.GREEN, "-."),
    "flops_balance": ("FLOPs", drawing.BLUE, ":"),
}


def _beside_the_end(axes, text: str, y: float, colour: str, above: bool) -> None:
    """Right of the axes, where no curve is."""
    place = {"xytext": (8, 7 if above else -7), "ha": "left", "va": "center", "annotation_clip": False}
    at = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points"}
    axes.annotate(text, (1, y), color=colour, fontweight="bold", zorder=4, **at, **place)


def loss(run: Run) -> Figure:
    """Loss on the training batches (line) and on held-out text (points)."""
    small = [(tag, run.losses[tag]) for tag in LOSS_NAMES if tag in run.losses]
    figure = Figure(figsize=(9, 4.2 + 2 * bool(small)), layout="constrained")
    rows = figure.add_gridspec(2 if small else 1, max(1, len(small)), height_ratios=[2.2, 1] if small else [1])
    axes = figure.add_subplot(rows[0, :])
    points = {
        "linestyle": "",
        "marker": "o",
        "markersize": 6,
        "markeredgecolor": "white",
        "zorder": 3,
        "clip_on": False,
    }
    looks = {
        TRAINING: ("training", drawing.BLUE, {"linewidth": 0.9}),
        VALIDATION: ("validation", drawing.VERMILLION, points),
    }
    shown = sorted((run.losses[tag].y[-1], *looks[tag], run.losses[tag]) for tag in looks if tag in run.losses)
    for place, (last, name, colour, look, curve) in enumerate(shown):
        axes.plot(curve.x, curve.y, label=name, color=colour, **(drawing.marker(len(curve.x)) | look))
        _beside_the_end(axes, f"{name} {last:.3f}", last, colour, above=place == len(shown) - 1)
    axes.margins(x=0, y=0.12)
    axes.set(title="Language-model loss", xlabel=drawing.X_LABEL, ylabel="loss (nats a token)")
    if shown:
        axes.legend()
    for column, (tag, curve) in enumerate(small):
        axes = figure.add_subplot(rows[1, column])
        axes.plot(curve.x, curve.y, color=drawing.GREEN, linewidth=0.9, **drawing.marker(len(curve.x)))
        axes.set(title=tag.replace("_", " "), xlabel=drawing.X_LABEL, ylabel=None if column else "without coefficient")
    return figure


def expert_share(run: Run) -> Figure:
    """Share of the routed tokens that went to each expert, mean over layers; the colour bar says which line is
    which."""
    figure, (axes,) = drawing.new_figure(5)
    experts = len(run.expert_E)
    drawing.lines_of_experts(figure, axes, run.iteration_N, run.share_NE, run.width_E)
    axes.axhline(100 / experts, color=drawing.GREY, linestyle="--", linewidth=1.2, label=f"equal shares, 1/{experts}")
    axes.set(
        title="Share of routed tokens by expert, mean over layers", xlabel=drawing.X_LABEL, ylabel="share of tokens (%)"
    )
    figure.legend(loc="outside lower center")
    return figure


def activated_ratio(run: Run) -> Figure:
    """Share of the training tokens that activate each expert, mean over layers. With Top-P or several experts a
    token they add up to more than 100 %."""
    figure, (axes,) = drawing.new_figure(5)
    drawing.lines_of_experts(figure, axes, run.iteration_N, run.ratio_NE, run.width_E)
    axes.set(
        title="Tokens that activate each expert, mean over layers", xlabel=drawing.X_LABEL, ylabel="share of tokens (%)"
    )
    return figure


def activated_parameters(run: Run) -> Figure:
    """Parameters that a token activates, mean over the tokens since the logged step before."""
    figure, (total, by_layer) = drawing.new_figure(7, nrows=2, sharex=True)
    x_N, (unit, label) = run.iteration_N, drawing.parameter_unit(run.total_parameters)
    all_of_them, last = run.total_parameters / unit, run.active_N[-1] / unit
    total.plot(
        x_N, run.active_N / unit, color=drawing.BLUE, linewidth=1.5, label="activated", **drawing.marker(len(x_N))
    )
    total.axhline(
        all_of_them, color=drawing.GREY, linestyle="--", linewidth=1.2, label=f"all parameters, {all_of_them:.4g}"
    )
    share = run.active_N[-1] / max(run.total_parameters, 1)
    _beside_the_end(total, f"{last:.4g} ({share:.0%} of all)", last, drawing.BLUE, above=share < 0.5)
    total.set(title="Parameters a token activates, whole model", ylabel=label)
    total.legend()
    unit, label = drawing.parameter_unit(run.active_NL.max())
    drawing.coloured_lines(figure, by_layer, x_N, run.active_NL / unit, run.layer_L, "layer")
    by_layer.set(title="Of these, in the experts of each layer", xlabel=drawing.X_LABEL, ylabel=label)
    for axes in (total, by_layer):
        axes.set_ylim(bottom=0)
    return figure


def rank_balance(run: Run) -> Figure:
    """Work of the busiest rank over the mean of the ranks; 1 is perfect. Time is measured on the logged step,
    forward and backward of the experts. A vertical line is a change of plan."""
    figure, (axes,) = drawing.new_figure(4.6)
    for of, (name, colour, line) in BALANCE_LOOKS.items():
        look = {"color": colour, "linestyle": line, "linewidth": 1.5} | drawing.marker(len(run.iteration_N))
        axes.plot(run.iteration_N, run.balance[of], label=f"{name}, last {run.balance[of][-1]:.2f}", **look)
    axes.axhline(1, color=drawing.GREY, linestyle="--", linewidth=1.2, label="all ranks equal")
    for place, change in enumerate(run.changes):
        label = f"changes of plan, {len(run.changes)}" if place == 0 else None
        axes.axvline(change["iteration"], color=drawing.GREY, linewidth=1, alpha=0.6, zorder=0, label=label)
    axes.set(title="Balance of the ranks", xlabel=drawing.X_LABEL, ylabel="busiest rank / mean of the ranks")
    axes.set_ylim(0.98, max(NOISE, axes.get_ylim()[1]))
    figure.legend(loc="outside lower center", ncols=2)
    return figure
