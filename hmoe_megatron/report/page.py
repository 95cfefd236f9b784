"""The HTML page: no script, nothing from elsewhere, all text escaped."""

import base64
from html import escape

from hmoe_megatron.placement.table import plan_table
from hmoe_megatron.report.run_files import Run
from hmoe_megatron.report.series import Series

MAX_ROWS = 20_000  # of the experts' tables
OPEN_LAYERS = 4  # tables that are shown unfolded
CAPTIONS = {
    "loss.png": "Loss on the training batches (line) and on held-out text (points).",
    "expert_share.png": "Share of the routed tokens that went to each expert, mean over layers; the colour bar "
    "says which line is which.",
    "activated_parameters.png": "Parameters that a token activates, mean over the tokens since the logged step before.",
    "rank_balance.png": "Work of the busiest rank over the mean of the ranks; 1 is perfect. Time is measured on the "
    "logged step, forward and backward of the experts.",
}
STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1a1a1a; background: #fff; max-width: 62rem; margin: 2rem auto;
  padding: 0 1rem; }
h1 { font-size: 1.6rem; margin-bottom: 0; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin-top: 2.5rem; border-bottom: 1px solid #ccc; }
dl { display: flex; flex-wrap: wrap; gap: .75rem 2.5rem; margin: 1rem 0; }
dt { color: #595959; font-size: .85rem; } dd { margin: 0; font-size: 1.15rem; font-weight: 600; }
figure { margin: 1.5rem 0; } img { width: 100%; height: auto; } figcaption { color: #595959; font-size: .9rem; }
.note { background: #fff4e5; border-left: 4px solid #d55e00; padding: .4rem .8rem; overflow-wrap: anywhere; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: .15rem .9rem; border-bottom: 1px solid #e5e5e5; white-space: nowrap; }
summary { cursor: pointer; margin: .8rem 0 .3rem; } .idle { color: #b34700; font-weight: 600; }
pre { overflow-x: auto; font-size: .85rem; background: #f6f6f6; padding: .8rem; }
"""


def html_page(run: Run, series: Series, pngs: dict[str, bytes]) -> bytes:
    """The page in UTF-8; pngs: file name -> picture."""
    title = escape(f"HMoE: {run.directory.absolute().name}")
    notes = "".join(f'<p class="note">{escape(note)}</p>\n' for note in run.notes)
    plan = f"<h2>Placement of the experts</h2>\n<pre>{escape(plan_table(run.plan))}</pre>\n" if run.plan else ""
    body = f"""<h1>{title}</h1>
{_headline(run, series)}
{notes}{"".join(figure(CAPTIONS[name], png) for name, png in pngs.items())}
<h2>Experts at iteration {run.last["iteration"]:,}</h2>
{_expert_tables(run)}
{plan}"""
    return document(title, body)


def document(title: str, body: str) -> bytes:
    """A page in UTF-8 that takes nothing from elsewhere; both texts are HTML already."""
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{STYLE}</style>
</head>
<body>
{body}</body>
</html>
""".encode(errors="replace")


def _headline(run: Run, series: Series) -> str:
    total, active = run.last["total_parameters"], run.last["activated_parameters"]
    validation = series.losses.get("validation")
    loss = f"{validation.y[0]:.3f} \u2192 {validation.y[-1]:.3f}" if validation else "not recorded"
    ranks = f"{len(run.last['expert_time_ms'])}" + (f", expert-parallel {run.plan.ranks}" if run.plan else "")
    facts = {
        "validation loss, first \u2192 last": loss,
        "steps": f"{run.last['iteration']:,}",
        "parameters": counted(total),
        "active a token": f"{counted(active)} ({active / max(total, 1):.0%})",
        "ranks": ranks,
    }
    return definitions(facts)


def definitions(facts: dict[str, str]) -> str:
    """Names and values, escaped here."""
    pairs = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in facts.items())
    return f"<dl>{pairs}</dl>"


def counted(count: float) -> str:
    """Four digits and a unit."""
    for unit, name in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= unit:
            return f"{count / unit:.4g} {name}"
    return f"{count:.4g}"


def figure(caption: str, png: bytes) -> str:
    """The picture in the page itself; the caption is escaped here."""
    caption, data = escape(caption), base64.b64encode(png).decode()
    image = f'<img alt="{caption}" src="data:image/png;base64,{data}">'
    return f"<figure>{image}<figcaption>{caption}</figcaption></figure>\n"


def _expert_tables(run: Run) -> str:
    layers = run.last["layers"]
    experts = len(layers[0]["token_share"])
    if len(layers) * experts > MAX_ROWS:
        return f"<p>{len(layers):,} layers of {experts:,} experts are too many for a table; see telemetry.jsonl.</p>"
    idle = {tuple(pair) for pair in run.last["experts_without_token"]}
    return "\n".join(_layer_table(row, layer, run, idle) for row, layer in enumerate(layers))


def _layer_table(row: int, layer: dict, run: Run, idle: set[tuple[int, int]]) -> str:
    number, idle_here = layer["layer"], sum(pair[0] == layer["layer"] for pair in idle)
    rows = []
    for expert, (tokens, flops) in enumerate(zip(layer["token_share"], layer["flops_share"], strict=True)):
        width = f"{run.plan.widths[row][expert]:,}" if run.plan else "?"
        mark = '<td class="idle">no token</td>' if (number, expert) in idle else "<td></td>"
        rows.append(f"<tr><td>{expert}</td><td>{width}</td><td>{tokens:.2%}</td><td>{flops:.2%}</td>{mark}</tr>\n")
    summary = (
        f"Layer {number}: {layer['experts_per_token']:.2f} experts a token, rank max/mean "
        f"FLOPs {layer['flops_balance']:.2f}, tokens {layer['token_balance']:.2f}"
        + (f", experts without a token: {idle_here}" if idle_here else "")
    )
    return (
        f"<details{' open' if row < OPEN_LAYERS else ''}><summary>{escape(summary)}</summary>\n"
        '<div class="wide"><table><thead><tr><th>expert</th><th>width</th><th>share of tokens</th>'
        f"<th>share of FLOPs</th><th></th></tr></thead>\n<tbody>\n{''.join(rows)}</tbody></table></div></details>"
    )
