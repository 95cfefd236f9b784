"""The pictures of a report, as PNG. No pyplot: nothing global is drawn on, no display is needed."""

import io

import matplotlib
import numpy as np
from matplotlib import colormaps
from matplotlib.cm import ScalarMappable
from matplotlib.colors import ListedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from hmoe_megatron.report.series import Series

BLUE, VERMILLION, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#595959"  # told apart by every kind of eye
NARROW_TO_WIDE = ListedColormap(colormaps["viridis"](np.linspace(0, 0.92, 256)))  # its last yellow is too pale
STYLE = {
    "font.size": 11, "axes.grid": True, "grid.alpha": 0.25, "axes.spines.top": False, "axes.spines.right": False,
    "axes.titlesize": 12, "axes.titlelocation": "left", "legend.frameon": False, "figure.dpi": 130,
}  # fmt: skip
FEW = 16  # lines that a colour bar names one by one
NOISE = 1.2  # the axis of balances reaches this far at least, for a few percent come and go with every step
X_LABEL = "iteration"


def draw(series: Series) -> dict[str, bytes]:
    """File name -> PNG. Without a loss there is no loss.png."""
    pictures = {
        "loss.png": _loss if series.losses or series.auxiliary else None,
        "expert_share.png": _expert_share,
        "activated_parameters.png": activated_parameters,
        "rank_balance.png": _rank_balance,
    }
    with matplotlib.rc_context(matplotlib.rcParamsDefault | STYLE):
        return {name: png(picture(series)) for name, picture in pictures.items() if picture}


def png(figure: Figure) -> bytes:
    """The figure as a PNG file's bytes, the same for the same figure."""
    for axes in figure.axes:
        if axes.get_xlabel() == X_LABEL:
            axes.xaxis.set_major_locator(MaxNLocator("auto", steps=[1, 2, 5, 10], integer=True))
    file = io.BytesIO()
    figure.savefig(file, format="png", metadata={"Software": None})
    return file.getvalue()


def new_figure(height_in: float, **grid) -> tuple[Figure, np.ndarray]:
    figure = Figure(figsize=(9, height_in), layout="constrained")
    return figure, figure.subplots(squeeze=False, **grid).ravel()


def _marker(count: int) -> dict:
    """A curve of few points shows them; one of a single point would not be seen at all without."""
    return {"marker": "o", "markersize": 3} if count <= 30 else {}


def _loss(series: Series) -> Figure:
    small = list(series.auxiliary.items())
    figure = Figure(figsize=(9, 4.2 + 2 * bool(small)), layout="constrained")
    rows = figure.add_gridspec(2 if small else 1, max(1, len(small)), height_ratios=[2.2, 1] if small else [1])
    axes = figure.add_subplot(rows[0, :])
    styles = {
        "training": {"color": BLUE, "linewidth": 0.9},
        "validation": {"color": VERMILLION, "linestyle": "", "marker": "o", "markersize": 6,
                       "markeredgecolor": "white", "zorder": 3},
    }  # fmt: skip
    for name, curve in series.losses.items():
        marker = _marker(len(curve.x)) if name == "training" else {}
        axes.plot(curve.x, curve.y, label=name, **styles[name], **marker)
    last = sorted((curve.y[-1], curve.x[-1], name) for name, curve in series.losses.items())
    for place, (y, x, name) in enumerate(last):
        above = place == len(last) - 1
        axes.annotate(
            f"{name} {y:.3f}", (x, y), xytext=(0, 9 if above else -9), textcoords="offset points", ha="right",
            va="bottom" if above else "top", color=styles[name]["color"], fontweight="bold", zorder=4,
        )  # fmt: skip
    axes.margins(y=0.12)
    axes.set(title="Language-model loss", xlabel=X_LABEL, ylabel="loss (nats a token)")
    if last:
        axes.legend()
    for column, (tag, curve) in enumerate(small):
        axes = figure.add_subplot(rows[1, column])
        axes.plot(curve.x, curve.y, color=GREEN, linewidth=0.9, **_marker(len(curve.x)))
        axes.set(title=tag.replace("_", " "), xlabel=X_LABEL, ylabel="without coefficient" if not column else None)
    return figure


def coloured_lines(figure, axes, x_N, y_NC, value_C, label: str) -> None:
    """A line for each column of y, coloured by its value; values ascend. The colour bar says which is which."""
    low, high = float(value_C[0]), float(value_C[-1])
    colour = ScalarMappable(Normalize(low, high if high > low else low + 1), NARROW_TO_WIDE)
    for y_N, value in zip(y_NC.T, value_C, strict=True):
        axes.plot(x_N, y_N, color=colour.to_rgba(value), linewidth=1.3 if len(value_C) <= FEW else 0.7,
                  **_marker(len(x_N)))  # fmt: skip
    values = np.unique(value_C)
    bar = figure.colorbar(colour, ax=axes, label=label, ticks=values if len(values) <= FEW else None)
    bar.ax.grid(False)
    if len(values) <= FEW:
        bar.ax.set_yticklabels([f"{value:,.6g}" for value in values])


def expert_colours(width_E: np.ndarray | None, experts: int) -> tuple[np.ndarray, str]:
    """(value of each expert, label of the colour bar) for coloured_lines: widths, which ascend, where they differ."""
    if width_E is not None and width_E[0] < width_E[-1]:
        return width_E, "width of the expert"
    return np.arange(experts), "expert" if width_E is None else f"expert (all of width {width_E[0]:,.6g})"


def _expert_share(series: Series) -> Figure:
    figure, (axes,) = new_figure(5)
    experts = len(series.expert_E)
    values, label = expert_colours(series.width_E, experts)
    coloured_lines(figure, axes, series.iteration_N, 100 * series.share_NE, values, label)
    axes.axhline(100 / experts, color=GREY, linestyle="--", linewidth=1.2, label=f"equal shares, 1/{experts}")
    axes.set(title="Share of routed tokens by expert, mean over layers", xlabel=X_LABEL, ylabel="share of tokens (%)")
    axes.set_ylim(bottom=0)
    figure.legend(loc="outside lower center")
    return figure


def parameter_unit(most: float) -> tuple[float, str]:
    """The unit of parameters, and a label."""
    for unit, name in ((1e9, "billions"), (1e6, "millions"), (1e3, "thousands")):
        if most >= unit:
            return unit, f"parameters ({name})"
    return 1.0, "parameters"


def activated_parameters(series: Series) -> Figure:
    figure, (total, by_layer) = new_figure(7, nrows=2, sharex=True)
    x_N, (unit, label) = series.iteration_N, parameter_unit(series.total_parameters)
    total.plot(x_N, series.active_N / unit, color=BLUE, linewidth=1.5, label="activated", **_marker(len(x_N)))
    total.axhline(series.total_parameters / unit, color=GREY, linestyle="--", linewidth=1.2,
                  label=f"all parameters, {series.total_parameters / unit:.4g}")  # fmt: skip
    last, share = series.active_N[-1] / unit, series.active_N[-1] / max(series.total_parameters, 1)
    above = share < 0.5
    total.annotate(
        f"{last:.4g} ({share:.0%} of all)", (x_N[-1], last), xytext=(0, 9 if above else -9), ha="right",
        textcoords="offset points", va="bottom" if above else "top", color=BLUE, fontweight="bold",
    )  # fmt: skip
    total.set(title="Parameters a token activates, whole model", ylabel=label)
    total.set_ylim(bottom=0)
    total.legend()
    unit, label = parameter_unit(series.active_NL.max())
    coloured_lines(figure, by_layer, x_N, series.active_NL / unit, series.layer_L, "layer")
    by_layer.set(title="Of these, in the experts of each layer", xlabel=X_LABEL, ylabel=label)
    by_layer.set_ylim(bottom=0)
    return figure


def _rank_balance(series: Series) -> Figure:
    figure, (axes,) = new_figure(4.6)
    looks = ((VERMILLION, "-"), (GREEN, "-."), (BLUE, ":"))
    order = ("measured expert time", "tokens", "FLOPs")
    for name, (colour, line) in zip(order, looks, strict=True):
        y_N = series.balance[name]
        axes.plot(series.iteration_N, y_N, color=colour, linestyle=line, linewidth=1.5,
                  label=f"{name}, last {y_N[-1]:.2f}", **_marker(len(y_N)))  # fmt: skip
    axes.axhline(1, color=GREY, linestyle="--", linewidth=1.2, label="all ranks equal")
    axes.set(title="Balance of the ranks", xlabel=X_LABEL, ylabel="busiest rank / mean of the ranks")
    axes.set_ylim(0.98, max(NOISE, axes.get_ylim()[1]))
    figure.legend(loc="outside lower center", ncols=2)
    return figure
