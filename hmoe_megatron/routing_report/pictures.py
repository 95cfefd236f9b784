"""The figures, as PNG. Those of training are drawn as tools/run_report.py draws them.

Legend: N logged steps, L MoE layers, E logical experts, D parts of the tokens by difficulty, Q questions.
"""

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from hmoe_megatron.report.pictures import (
    BLUE,
    FEW,
    GREY,
    NARROW_TO_WIDE,
    STYLE,
    VERMILLION,
    X_LABEL,
    activated_parameters,
    coloured_lines,
    expert_colours,
    new_figure,
    parameter_unit,
    png,
)  # fmt: skip
from hmoe_megatron.routing_report import statistics
from hmoe_megatron.routing_report.over_training import Training
from hmoe_megatron.routing_report.statistics import Model, Routing

PANELS = 4  # layers whose experts are compared in a figure
MAX_WRITTEN = 256  # cells of a heat map that have their number written in


def draw_training(training: Training) -> dict[str, bytes]:
    """File name -> PNG."""
    return _drawn({
        "activated_ratio_over_training.png": lambda: _ratio_over_training(training),
        "activated_parameters_over_training.png": lambda: activated_parameters(training),
    })  # fmt: skip


def draw_text(model: Model, routing: Routing) -> dict[str, bytes]:
    """File name -> PNG."""
    return _drawn({
        "activated_ratio_by_layer.png": lambda: _ratio_by_layer(model, routing),
        "activated_parameters_by_layer.png": lambda: _parameters_by_layer(model, routing),
        "similarity.png": lambda: _similarity(model, routing),
        "synergy.png": lambda: _synergy(model, routing),
        "difficulty.png": lambda: _difficulty(model, routing),
    })  # fmt: skip


def draw_questions(model: Model, easy: Routing, hard: Routing) -> dict[str, bytes]:
    """File name -> PNG."""
    return _drawn({"easy_and_hard.png": lambda: _easy_and_hard(model, easy, hard)})


def _drawn(pictures: dict) -> dict[str, bytes]:
    with matplotlib.rc_context(matplotlib.rcParamsDefault | STYLE | {"axes.axisbelow": True}):
        return {name: png(picture()) for name, picture in pictures.items()}


def _ratio_over_training(training: Training) -> Figure:
    figure, (axes,) = new_figure(5)
    values, label = expert_colours(training.width_E, training.ratio_NE.shape[1])
    coloured_lines(figure, axes, training.iteration_N, 100 * training.ratio_NE, values, label)
    axes.set(title="Tokens that activate each expert, mean over layers", xlabel=X_LABEL, ylabel="share of tokens (%)")
    axes.set_ylim(bottom=0)
    return figure


def expert_names(model: Model) -> tuple[list[str], str]:
    """(a name of each expert from narrow to wide, what the names are): widths if no two are equal, else numbers."""
    width_E = model.width_LE.mean(0)[model.expert_E]
    if len(np.unique(width_E)) == len(width_E):
        return [f"{width:,.6g}" for width in width_E], "expert, by its width"
    names = [str(expert) for expert in model.expert_E]
    return names, "expert" if width_E[0] == width_E[-1] else "expert, from narrow to wide"


def layers_shown(model: Model) -> list[int]:
    """Rows of the layers that are compared: the first, the last, and some between them."""
    count = len(model.layer_L)
    return sorted(set(np.linspace(0, count - 1, min(PANELS, count)).round().astype(int).tolist()))


def _heat(axes: Axes, values: np.ndarray, norm: Normalize, pattern: str, palette) -> None:
    """A cell of each value, the value written in where there is room; NaN stays grey."""
    axes.set_facecolor("#cccccc")
    axes.pcolormesh(np.ma.masked_invalid(values), norm=norm, cmap=palette, edgecolor="white", linewidth=0.5)
    axes.invert_yaxis()
    axes.grid(False)
    if values.size > MAX_WRITTEN or values.shape[1] > FEW:
        return
    for (row, column), value in np.ndenumerate(values):
        light = np.isnan(value) or sum(palette(norm(value))[:3]) > 1.6
        axes.text(column + 0.5, row + 0.5, "-" if np.isnan(value) else pattern.format(value), ha="center", va="center",
                  fontsize=8, color="black" if light else "white")  # fmt: skip


def _name_cells(axis, names: list[str], rotation: float = 0) -> None:
    step = -(-len(names) // FEW)
    axis.set_ticks(np.arange(len(names))[::step] + 0.5, names[::step], rotation=rotation)


def _ratio_by_layer(model: Model, routing: Routing) -> Figure:
    ratio_LE = 100 * statistics.activated_ratio(routing.chosen_TLE)[:, model.expert_E]
    figure, (axes,) = new_figure(max(2.8, 1.6 + 0.42 * min(len(ratio_LE), 24)))
    norm, (names, what) = Normalize(0, ratio_LE.max()), expert_names(model)
    _heat(axes, ratio_LE, norm, "{:.1f}", NARROW_TO_WIDE)
    _name_cells(axes.xaxis, names)
    _name_cells(axes.yaxis, [str(layer) for layer in model.layer_L])
    figure.colorbar(ScalarMappable(norm, NARROW_TO_WIDE), ax=axes, label="share of tokens (%)").ax.grid(False)
    axes.set(title="Tokens that activate each expert", xlabel=what, ylabel="layer")
    return figure


def _parameters_by_layer(model: Model, routing: Routing) -> Figure:
    figure, (axes,) = new_figure(4.6)
    active_L = statistics.activated_parameters(statistics.activated_ratio(routing.chosen_TLE), model)
    all_L = statistics.activated_parameters(np.ones(model.width_LE.shape), model)
    unit, label = parameter_unit(all_L.max())
    x_L = np.arange(len(model.layer_L))
    axes.bar(x_L, all_L / unit, 0.7, color="white", edgecolor=GREY, label="all experts of the layer")
    axes.bar(x_L, active_L / unit, 0.7, color=BLUE, label="activated by a token, mean")
    if len(x_L) <= FEW:
        for x, active, of in zip(x_L, active_L, all_L, strict=True):
            axes.annotate(f"{active / of:.1%}", (x, active / unit), xytext=(0, 3), textcoords="offset points",
                          ha="center", color=BLUE, fontweight="bold", fontsize=9)  # fmt: skip
    step = -(-len(x_L) // FEW)
    axes.set_xticks(x_L[::step], model.layer_L[::step])
    axes.grid(axis="x", visible=False)
    axes.set(title="Parameters of the experts", xlabel="layer", ylabel=label)
    figure.legend(loc="outside lower center", ncols=2)
    return figure


def _between_experts(model: Model, matrix_of_row, title: str, label: str, pattern: str, axis_names) -> Figure:
    """A heat map of each layer shown, [E, E] from `matrix_of_row`, all on one colour scale that begins at 0."""
    shown, (names, what) = layers_shown(model), expert_names(model)
    matrices = [matrix_of_row(row)[np.ix_(model.expert_E, model.expert_E)] for row in shown]
    columns = min(2, len(shown))
    figure = Figure(figsize=(10, 4.6 * -(-len(shown) // columns) + 0.3), layout="constrained")
    axes_N = figure.subplots(-(-len(shown) // columns), columns, squeeze=False).ravel()
    norm, palette = Normalize(0, max(np.nanmax(matrix, initial=0) for matrix in matrices) or 1), NARROW_TO_WIDE
    for axes in axes_N[len(shown) :]:
        axes.remove()
    for axes, row, matrix in zip(axes_N, shown, matrices, strict=False):
        _heat(axes, matrix, norm, pattern, palette)
        _name_cells(axes.xaxis, names, rotation=45)
        _name_cells(axes.yaxis, names)
        axes.set(title=f"layer {model.layer_L[row]}", xlabel=axis_names[1].format(what), aspect="equal",
                 ylabel=axis_names[0].format(what))  # fmt: skip
    figure.suptitle(title, x=0.01, ha="left")
    figure.colorbar(ScalarMappable(norm, palette), ax=list(axes_N[: len(shown)]), label=label).ax.grid(False)
    return figure


def _similarity(model: Model, routing: Routing) -> Figure:
    def distance(row):
        _, total_U, counts_EU = statistics.token_counts(routing.token_T, routing.chosen_TLE[:, row])
        return statistics.similarity(counts_EU, total_U)

    return _between_experts(model, distance, "Distance between the experts' tokens (0: the same)",
                            "Wasserstein distance (share of the text)", "{:.2f}", ("{}", "{}"))  # fmt: skip


def _synergy(model: Model, routing: Routing) -> Figure:
    return _between_experts(
        model, lambda row: statistics.synergy(routing.log_probs_TLE[:, row]),
        "Divergence of the experts' weights over the tokens (0: both want the same tokens)",
        "KL(row || column) (nats)", "{:.2f}", ("row: {}", "column: {}"),
    )  # fmt: skip


def _difficulty(model: Model, routing: Routing) -> Figure:
    share_DE, loss_D = statistics.shares_by_difficulty(routing.chosen_TLE, routing.loss_T)
    figure, (axes,) = new_figure(5)
    values, label = expert_colours(model.width_LE.mean(0)[model.expert_E], len(model.expert_E))
    x_D = np.arange(1, len(loss_D) + 1)
    coloured_lines(figure, axes, x_D, 100 * share_DE[:, model.expert_E], values, label)
    axes.set_xticks(x_D, [f"{part}\n{loss:.2f}" for part, loss in zip(x_D, loss_D, strict=True)])
    axes.set(title="Share of each expert, mean over layers", ylabel="share of the routed tokens (%)",
             xlabel="tenth of the tokens, from easy to hard; below: the model's mean loss on them (nats)")  # fmt: skip
    axes.set_ylim(bottom=0)
    return figure


def _easy_and_hard(model: Model, easy: Routing, hard: Routing) -> Figure:
    figure = Figure(figsize=(10, 5), layout="constrained")
    experts, parameters = figure.subplots(1, 2, width_ratios=[3.2, 1])
    names, what = expert_names(model)
    sets = (("easy", easy, BLUE, -0.2), ("hard", hard, VERMILLION, 0.2))
    for name, routing, colour, offset in sets:
        ratio_QE, share_Q = statistics.by_question(routing, model)
        ratio_E, error_E = (100 * part_E[model.expert_E] for part_E in statistics.mean_and_error(ratio_QE))
        share, error = (100 * part for part in statistics.mean_and_error(share_Q))
        bars = {"color": colour, "ecolor": "black", "capsize": 3, "width": 0.38}
        experts.bar(np.arange(len(ratio_E)) + offset, ratio_E, yerr=error_E,
                    label=f"{name}, {len(share_Q):,} questions", **bars)  # fmt: skip
        parameters.bar([name], [share], yerr=[error], **bars | {"width": 0.6})
        parameters.annotate(f"{share:.2f}", (name, share / 2), ha="center", va="center", color="white",
                            fontweight="bold")  # fmt: skip
    step = -(-len(names) // FEW)
    experts.set_xticks(np.arange(len(names))[::step], names[::step])
    experts.set(title="Tokens that activate each expert", xlabel=what, ylabel="share of a question's tokens (%)")
    parameters.set(title="Experts' parameters", ylabel="activated by a token (%)")
    for axes in (experts, parameters):
        axes.grid(axis="x", visible=False)
    figure.legend(loc="outside lower center", ncols=2)
    return figure
