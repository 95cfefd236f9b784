"""The HTML page: no script, nothing from elsewhere. Tokens come from untrusted text: escaped, and all that is not
plainly visible is written as an escape sequence, so that no control character acts in the browser."""

import unicodedata
from html import escape

import numpy as np

from hmoe_megatron.report.page import MAX_ROWS, OPEN_LAYERS, counted, definitions, document, figure
from hmoe_megatron.routing_report import statistics
from hmoe_megatron.routing_report.over_training import Training
from hmoe_megatron.routing_report.statistics import Model, Routing

MAX_TOKEN_CHARS = 32  # of a token that is shown
LEAST, MOST = 5, 12  # occurrences of a token among an expert's top tokens; how many are shown
SPACE = "\u2423"
TOKEN = 'style="display: inline-block; white-space: nowrap; margin-right: .7em"'
TOKENS_CELL = 'style="text-align: left; white-space: normal"'
CAPTIONS = {
    "activated_ratio_over_training.png": "Share of the training tokens that activate each expert, mean over layers. "
    "With Top-P or several experts a token they add up to more than 100 %.",
    "activated_parameters_over_training.png": "Parameters that a token activates, mean over the tokens since the "
    "logged step before.",
    "activated_ratio_by_layer.png": "Share of the text's tokens (%) that activate each expert, by layer.",
    "activated_parameters_by_layer.png": "Parameters of each layer's experts that a token of the text activates, and "
    "all there are; the percentage is their ratio.",
    "similarity.png": "Similarity: how far the tokens of two experts are from each other. 1-Wasserstein distance of "
    "their token distributions, the text's tokens in a line from frequent to rare, each as long as its share of the "
    "text. Grey: an expert without a token.",
    "synergy.png": "Synergy: KL divergence, in nats, of the routers' probability of the row's expert, as a "
    "distribution over the tokens of the text, from that of the column's expert. Small: the same tokens call for both.",
    "difficulty.png": "Share of each expert in the routed tokens, by difficulty: tenths of the tokens by the model's "
    "own loss on the token that the experts are given.",
    "easy_and_hard.png": "Routing of easy and of hard questions, each with its right answer; the mean over questions "
    "of each question's own share. Bars: 95 % interval of the mean over questions.",
}


def visible(token: str) -> str:
    """The token, not yet escaped for HTML, with its spaces, control, format and unassigned characters made visible."""
    shown = token[:MAX_TOKEN_CHARS].replace(" ", SPACE)
    letters = (c if unicodedata.category(c)[0] not in "CZ" else c.encode("unicode_escape").decode() for c in shown)
    return "".join(letters) + "\u2026" * (len(token) > MAX_TOKEN_CHARS)


def page(title: str, facts: dict[str, str], notes: list[str], sections: list[tuple[str, str]]) -> bytes:
    """The page in UTF-8. sections: (heading, HTML); all else is escaped here."""
    noted = "".join(f'<p class="note">{escape(note)}</p>\n' for note in notes)
    parts = "".join(f"<h2>{escape(heading)}</h2>\n{html}\n" for heading, html in sections)
    return document(escape(title), f"<h1>{escape(title)}</h1>\n{definitions(facts)}\n{noted}{parts}")


def figures(pngs: dict[str, bytes]) -> str:
    return "".join(figure(CAPTIONS[name], png) for name, png in pngs.items())


def training_facts(training: Training) -> dict[str, str]:
    active, total = training.active_N[-1], training.total_parameters
    return {"parameters": counted(total), "active a token": f"{counted(active)} ({active / max(total, 1):.0%})",
            "last logged step": f"{training.iteration_N[-1]:,}"}  # fmt: skip


def text_facts(iteration: int, routing: Routing) -> dict[str, str]:
    experts = routing.chosen_TLE.sum(2).mean()
    return {"checkpoint of step": f"{iteration:,}", "tokens of text": f"{len(routing.token_T):,}",
            "loss on them": f"{np.nanmean(routing.loss_T):.3f} nats", "experts a token": f"{experts:.2f}"}  # fmt: skip


def top_tokens(model: Model, routing: Routing, texts_of) -> str:
    """A table of each layer. texts_of: token ids -> their texts."""
    if model.width_LE.size > MAX_ROWS:
        return f"<p>{model.width_LE.size:,} experts are too many for tables.</p>"
    intro = (f"<p>Of the tokens that stand in the text {LEAST} times or more those of which the largest share chose "
             f"the expert; {SPACE} is a space.</p>\n")  # fmt: skip
    return intro + "".join(_layer(row, model, routing, texts_of) for row in range(len(model.layer_L)))


def _layer(row: int, model: Model, routing: Routing, texts_of) -> str:
    ids_U, total_U, counts_EU = statistics.token_counts(routing.token_T, routing.chosen_TLE[:, row])
    top = statistics.top_tokens(counts_EU, total_U, LEAST, MOST)
    texts = dict(zip(known := sorted({u for tokens in top for u, _ in tokens}), texts_of(ids_U[known]), strict=True))
    ratio_E, rows = routing.chosen_TLE[:, row].mean(0), []
    for expert in model.expert_E:
        tokens = " ".join(f"<span {TOKEN}><code>{escape(visible(texts[u]))}</code>&nbsp;{ratio:.0%}</span>"
                          for u, ratio in top[expert])  # fmt: skip
        rows.append(f"<tr><td>{expert}</td><td>{model.width_LE[row, expert]:,}</td><td>{ratio_E[expert]:.2%}</td>"
                    f"<td {TOKENS_CELL}>{tokens}</td></tr>\n")  # fmt: skip
    return (
        f"<details{' open' if row < OPEN_LAYERS else ''}><summary>Layer {model.layer_L[row]}</summary>\n"
        '<div class="wide"><table><thead><tr><th>expert</th><th>width</th><th>share of all tokens</th>'
        f"<th {TOKENS_CELL}>top tokens, and the share of each that chose the expert</th></tr></thead>\n"
        f"<tbody>\n{''.join(rows)}</tbody></table></div></details>\n"
    )
