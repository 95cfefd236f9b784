"""How every picture of a report looks. No pyplot: nothing global is drawn on, no display is needed.

Legend: N points of a line, C lines, E logical experts.
"""

import io
from collections.abc import Callable

import matplotlib
import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import ListedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

BLUE, VERMILLION, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#595959"  # distinct for every kind of eye
NARROW_TO_WIDE = ListedColormap(colormaps["viridis"](np.linspace(0, 0.92, 256)))  # its last yellow is too pale
STYLE = {
    "font.size": 11,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.alpha": 0.25,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 12,
    "axes.titlelocation": "left",
    "legend.frameon": False,
    "figure.dpi": 130,
}
FEW = 16  # lines that a colour bar names one by one, cells that an axis does
X_LABEL = "iteration"
Pictures = dict[str, Callable[..., Figure]]  # file name -> what draws it, its caption as the docstring
Drawn = dict[str, tuple[bytes, str]]  # file name -> (PNG, caption)


def draw(pictures: Pictures, *data) -> Drawn:
    """Every picture of the same data."""
    with matplotlib.rc_context(matplotlib.rcParamsDefault | STYLE):
        return {name: (png(of(*data)), " ".join(of.__doc__.split())) for name, of in pictures.items()}


def png(figure: Figure) -> bytes:
    """The figure as a PNG file's bytes, the same for the same figure."""
    for axes in figure.axes:
        if axes.get_xlabel() == X_LABEL:
            axes.xaxis.set_major_locator(MaxNLocator("auto", steps=[1, 2, 5, 10], integer=True))
    file = io.BytesIO()
    figure.savefig(file, format="png", metadata={"Software": None})
    return file.getvalue()


def new_figure(height_in: float, width_in: float = 9, **grid) -> tuple[Figure, np.ndarray]:
    """(figure, its axes in one row)."""
    figure = Figure(figsize=(width_in, height_in), layout="constrained")
    return figure, figure.subplots(squeeze=False, **grid).ravel()


def marker(count: int) -> dict:
    """A curve of few points shows them; one of a single point would not be seen at all without."""
    return {"marker": "o", "markersize": 3} if count <= 30 else {}


def coloured_lines(figure: Figure, axes: Axes, x_N, y_NC, value_C, label: str) -> None:
    """A line for each column of y, coloured by its value; values ascend. The colour bar says which is which."""
    low, high = float(value_C[0]), float(value_C[-1])
    colour = ScalarMappable(Normalize(low, high if high > low else low + 1), NARROW_TO_WIDE)
    look = {"linewidth": 1.3 if len(value_C) <= FEW else 0.7} | marker(len(x_N))
    for y_N, value in zip(y_NC.T, value_C, strict=True):
        axes.plot(x_N, y_N, color=colour.to_rgba(value), **look)
    values = np.unique(value_C)
    few = len(values) <= FEW
    bar = figure.colorbar(colour, ax=axes, label=label, ticks=values if few else None)
    bar.ax.grid(False)
    if few:
        bar.ax.set_yticklabels([f"{value:,.6g}" for value in values])


def lines_of_experts(figure: Figure, axes: Axes, x_N, y_NE, width_E: np.ndarray | None) -> None:
    """A line for each expert in percent, from 0, coloured by widths, which ascend, where they are known and differ."""
    value_E, label = np.arange(y_NE.shape[1]), "expert"
    if width_E is not None:
        differ = width_E[0] < width_E[-1]
        value_E = width_E if differ else value_E
        label = "width of the expert" if differ else f"expert (all of width {width_E[0]:,.6g})"
    coloured_lines(figure, axes, x_N, 100 * y_NE, value_E, label)
    axes.set_ylim(bottom=0)


def parameter_unit(most: float) -> tuple[float, str]:
    """The unit of parameters, and a label."""
    for unit, name in ((1e9, "billions"), (1e6, "millions"), (1e3, "thousands")):
        if most >= unit:
            return unit, f"parameters ({name})"
    return 1.0, "parameters"
