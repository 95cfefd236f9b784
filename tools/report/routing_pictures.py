"""The pictures of a model's routing of text and questions; the docstring of each is its caption.

Legend: L MoE layers, E logical experts, D parts of the tokens by difficulty, Q questions.
"""

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from hmoe_megatron.tools.report import drawing, statistics
from hmoe_megatron.tools.report.statistics import Model, Routing

PANELS = 4  # layers whose experts are compared in a figure
MAX_WRITTEN = 256  # cells of a heat map that have their number written in


def expert_names(model: Model) -> tuple[list[str], str]:
    """(a name of each expert from narrow to wide, what the names are): widths if no two are equal, else numbers."""
    width_E = model.width_LE.mean(0)[model.expert_E]
    if len(np.unique(width_E)) == len(width_E):
        return [f"{width:,.6g}" for width in width_E], "expert, by its width"
    names = [str(expert) for expert in model.expert_E]
    return names, "expert" if width_E[0] == width_E[-1] else "expert, from narrow to wide"


def _name_places(axis, names, first: float = 0.0, rotation: float = 0) -> None:
    """At places one apart; of many every second, third, ... name."""
    step = -(-len(names) // drawing.FEW)
    axis.set_ticks(np.arange(len(names))[::step] + first, names[::step], rotation=rotation)


def _heat_maps(figure: Figure, axes_N: list[Axes], maps: list[np.ndarray], label: str, pattern: str) -> None:
    """A cell of each value, all on one colour scale from 0, the value written in where there is room; NaN is grey."""
    norm = Normalize(0, max(np.nanmax(values, initial=0) for values in maps) or 1)
    for axes, values in zip(axes_N, maps, strict=True):
        axes.set_facecolor("#cccccc")
        axes.pcolormesh(
            np.ma.masked_invalid(values), norm=norm, cmap=drawing.NARROW_TO_WIDE, edgecolor="white", linewidth=0.5
        )
        axes.invert_yaxis()
        axes.grid(False)
        if values.size > MAX_WRITTEN or values.shape[1] > drawing.FEW:
            continue
        for (row, column), value in np.ndenumerate(values):
            is_light = np.isnan(value) or sum(drawing.NARROW_TO_WIDE(norm(value))[:3]) > 1.6
            look = {"ha": "center", "va": "center", "fontsize": 8, "color": "black" if is_light else "white"}
            axes.text(column + 0.5, row + 0.5, "-" if np.isnan(value) else pattern.format(value), **look)
    figure.colorbar(ScalarMappable(norm, drawing.NARROW_TO_WIDE), ax=axes_N, label=label).ax.grid(False)


def ratio_by_layer(model: Model, routing: Routing) -> Figure:
    """Share of the text's tokens (%) that activate each expert, by layer."""
    ratio_LE = 100 * routing.chosen_TLE.mean(0)[:, model.expert_E]
    figure, (axes,) = drawing.new_figure(max(2.8, 1.6 + 0.42 * min(len(ratio_LE), 24)))
    _heat_maps(figure, [axes], [ratio_LE], "share of tokens (%)", "{:.1f}")
    names, what = expert_names(model)
    _name_places(axes.xaxis, names, 0.5)
    _name_places(axes.yaxis, model.layer_L, 0.5)
    axes.set(title="Tokens that activate each expert", xlabel=what, ylabel="layer")
    return figure


def parameters_by_layer(model: Model, routing: Routing) -> Figure:
    """Parameters of each layer's experts that a token of the text activates, and all there are; the percentage is
    their ratio."""
    figure, (axes,) = drawing.new_figure(4.6)
    active_L = statistics.activated_parameters(routing.chosen_TLE.mean(0), model)
    all_L = statistics.activated_parameters(np.ones(model.width_LE.shape), model)
    unit, label = drawing.parameter_unit(all_L.max())
    x_L = np.arange(len(model.layer_L))
    axes.bar(x_L, all_L / unit, 0.7, color="white", edgecolor=drawing.GREY, label="all experts of the layer")
    bars = axes.bar(x_L, active_L / unit, 0.7, color=drawing.BLUE, label="activated by a token, mean")
    if len(x_L) <= drawing.FEW:
        shares = [f"{share:.1%}" for share in active_L / all_L]
        axes.bar_label(bars, shares, padding=3, color=drawing.BLUE, fontweight="bold", fontsize=9)
    _name_places(axes.xaxis, model.layer_L)
    axes.grid(axis="x", visible=False)
    axes.set(title="Parameters of the experts", xlabel="layer", ylabel=label)
    figure.legend(loc="outside lower center", ncols=2)
    return figure


def _between_experts(model: Model, matrix_of_row, title: str, label: str, x_name: str, y_name: str) -> Figure:
    """A heat map, [E, E] from `matrix_of_row`, of the first layer, the last, and some between them."""
    layers = len(model.layer_L)
    shown = sorted({round(row) for row in np.linspace(0, layers - 1, min(PANELS, layers)).tolist()})
    matrices = [matrix_of_row(row)[np.ix_(model.expert_E, model.expert_E)] for row in shown]
    columns = min(2, len(shown))
    rows = -(-len(shown) // columns)
    figure, axes_N = drawing.new_figure(4.6 * rows + 0.3, 10, nrows=rows, ncols=columns)
    for axes in axes_N[len(shown) :]:
        axes.remove()
    axes_N, (names, what) = list(axes_N[: len(shown)]), expert_names(model)
    _heat_maps(figure, axes_N, matrices, label, "{:.2f}")
    for axes, row in zip(axes_N, shown, strict=True):
        _name_places(axes.xaxis, names, 0.5, rotation=45)
        _name_places(axes.yaxis, names, 0.5)
        axes.set(title=f"layer {model.layer_L[row]}", aspect="equal", xlabel=x_name + what, ylabel=y_name + what)
    figure.suptitle(title, x=0.01, ha="left")
    return figure


def similarity(model: Model, routing: Routing) -> Figure:
    """Similarity: how far the tokens of two experts are from each other. 1-Wasserstein distance of their token
    distributions, the text's tokens in a line from frequent to rare, each as long as its share of the text. Grey:
    an expert without a token."""

    def distance(row):
        _, total_U, counts_EU = statistics.token_counts(routing.token_T, routing.chosen_TLE[:, row])
        return statistics.similarity(counts_EU, total_U)

    title, label = "Distance between the experts' tokens (0: the same)", "Wasserstein distance (share of the text)"
    return _between_experts(model, distance, title, label, "", "")


def synergy(model: Model, routing: Routing) -> Figure:
    """Synergy: KL divergence, in nats, of the routers' probability of the row's expert, as a distribution over the
    tokens of the text, from that of the column's expert. Small: the same tokens call for both."""

    def divergence(row):
        return statistics.synergy(routing.log_probs_TLE[:, row])

    title = "Divergence of the experts' weights over the tokens (0: both want the same tokens)"
    return _between_experts(model, divergence, title, "KL(row || column) (nats)", "column: ", "row: ")


def difficulty(model: Model, routing: Routing) -> Figure:
    """Share of each expert in the routed tokens, by difficulty: tenths of the tokens by the model's own loss on the
    token that the experts are given."""
    share_DE, loss_D = statistics.shares_by_difficulty(routing.chosen_TLE, routing.loss_T)
    figure, (axes,) = drawing.new_figure(5)
    x_D = np.arange(1, len(loss_D) + 1)
    width_E = model.width_LE.mean(0)[model.expert_E]
    drawing.lines_of_experts(figure, axes, x_D, share_DE[:, model.expert_E], width_E)
    axes.set_xticks(x_D, [f"{part}\n{loss:.2f}" for part, loss in zip(x_D, loss_D, strict=True)])
    axes.set(
        title="Share of each expert, mean over layers",
        xlabel="tenth of the tokens, from easy to hard; below: the model's mean loss on them (nats)",
        ylabel="share of the routed tokens (%)",
    )
    return figure


def easy_and_hard(model: Model, easy: Routing, hard: Routing) -> Figure:
    """Routing of easy and of hard questions, each with its right answer; the mean over questions of each question's
    own share. Bars: 95 % interval of the mean over questions."""
    figure, (experts, parameters) = drawing.new_figure(5, 10, ncols=2, width_ratios=[3.2, 1])
    names, what = expert_names(model)
    for name, routing, colour, offset in (("easy", easy, drawing.BLUE, -0.2), ("hard", hard, drawing.VERMILLION, 0.2)):
        ratio_QE, share_Q = statistics.by_question(routing, model)
        ratio_E, error_E = (100 * part_E[model.expert_E] for part_E in statistics.mean_and_error(ratio_QE))
        share, error = (100 * part for part in statistics.mean_and_error(share_Q))
        look, label = {"color": colour, "ecolor": "black", "capsize": 3}, f"{name}, {len(share_Q):,} questions"
        experts.bar(np.arange(len(ratio_E)) + offset, ratio_E, 0.38, yerr=error_E, label=label, **look)
        bar = parameters.bar([name], [share], 0.6, yerr=[error], **look)
        parameters.bar_label(bar, fmt="{:.2f}", label_type="center", color="white", fontweight="bold")
    _name_places(experts.xaxis, names)
    experts.set(title="Tokens that activate each expert", xlabel=what, ylabel="share of a question's tokens (%)")
    parameters.set(title="Experts' parameters", ylabel="activated by a token (%)")
    for axes in (experts, parameters):
        axes.grid(axis="x", visible=False)
    figure.legend(loc="outside lower center", ncols=2)
    return figure
