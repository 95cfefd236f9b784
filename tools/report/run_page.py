"""The report of a training run: losses, experts, ranks, and the plan. Imports no torch."""

import os
import shlex
from dataclasses import replace
from html import escape
from pathlib import Path

from hmoe_megatron.files import RUN_ARGUMENTS_FILE, read_text
from hmoe_megatron.flag_files import run_arguments
from hmoe_megatron.placement.table import plan_table
from hmoe_megatron.tools.report import training_pictures
from hmoe_megatron.tools.report.drawing import draw
from hmoe_megatron.tools.report.page import MAX_ROWS, figures, html_page, layer_table, write_files
from hmoe_megatron.tools.report.run_files import Run, read_run
from hmoe_megatron.tools.report.scalars import VALIDATION, read_scalars

PICTURES = {
    "loss.png": training_pictures.loss,
    "expert_share.png": training_pictures.expert_share,
    "activated_parameters.png": training_pictures.activated_parameters,
    "rank_balance.png": training_pictures.rank_balance,
}
MAX_SAMPLE_BYTES = 1 << 16
HEADS = ("expert", "width", "share of tokens", "share of FLOPs", "")


def write_report(
    run_dir: str | os.PathLike,
    output: str | os.PathLike | None = None,
    png_dir: str | os.PathLike | None = None,
    tensorboard_dir: str | os.PathLike | None = None,
    sample: str | os.PathLike | None = None,
) -> list[Path]:
    """Write the page and its pictures; returns their paths, the page first.

    output: default report.html in the run directory; png_dir: default figures/ beside the page; tensorboard_dir:
    default tensorboard/ in the run directory; sample: a file of text that the model wrote. Raises ValueError with file
    and line for what cannot be read.
    """
    run_dir, notes = Path(run_dir), []
    run = read_run(run_dir, notes)
    run = replace(run, losses=read_scalars(Path(tensorboard_dir or run_dir / "tensorboard"), notes))
    pictures = PICTURES if run.losses else {name: of for name, of in PICTURES.items() if name != "loss.png"}
    drawn = draw(pictures, run)
    sections = [("", figures(drawn)), (f"Experts at iteration {run.last['iteration']:,}", _expert_tables(run))]
    if run.plan:
        sections.append(("Placement of the experts", f"<pre>{escape(plan_table(run.plan))}</pre>"))
    if (run_dir / RUN_ARGUMENTS_FILE).exists():
        sections.append(("Flags", f'<pre class="text">{escape(shlex.join(run_arguments(run_dir)))}</pre>'))
    if sample:
        sections.append(("Sampled text", f'<pre class="text">{escape(_text(Path(sample)))}</pre>'))
    html = html_page(f"HMoE: {run_dir.absolute().name}", _facts(run), notes, sections)
    page = Path(output or run_dir / "report.html")
    return write_files(page, html, Path(png_dir or page.parent / "figures"), drawn, PICTURES)


def _text(path: Path) -> str:
    try:
        return read_text(path, MAX_SAMPLE_BYTES)[:MAX_SAMPLE_BYTES]
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _facts(run: Run) -> dict[str, str]:
    validation = run.losses.get(VALIDATION)
    return {
        "validation loss, first \u2192 last": (
            f"{validation.y[0]:.3f} \u2192 {validation.y[-1]:.3f}" if validation else "not recorded"
        ),
        "steps": f"{run.last['iteration']:,}",
        **parameter_facts(run),
        **({"tokens/s, median": f"{run.tokens_per_s:,.0f}"} if run.tokens_per_s else {}),
        "ranks": f"{len(run.last['expert_time_ms'])}" + (f", expert-parallel {run.plan.ranks}" if run.plan else ""),
        **({"experts moved": _changes(run.changes)} if run.changes else {}),
        **({"commit": run.commit} if run.commit else {}),
    }


def _changes(changes: list[dict]) -> str:
    amount, seconds = (sum(change[name] for change in changes) for name in ("bytes", "seconds"))
    first, last = changes[0]["balance_before"], changes[-1]["balance_after"]
    return (
        f"{len(changes)} times, {amount / 1e6:,.1f} MB in {seconds:.1f} s; slowest rank over mean "
        f"{first:.2f} \u2192 {last:.2f}"
    )


def parameter_facts(run: Run) -> dict[str, str]:
    """Of the whole model, at the last logged step."""
    active, total = run.active_N[-1], run.total_parameters
    return {"parameters": _counted(total), "active a token": f"{_counted(active)} ({active / max(total, 1):.0%})"}


def _counted(count: float) -> str:
    """Four digits and a unit."""
    for unit, name in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= unit:
            return f"{count / unit:.4g} {name}"
    return f"{count:.4g}"


def _expert_tables(run: Run) -> str:
    layers, experts = run.last["layers"], len(run.expert_E)
    if len(layers) * experts > MAX_ROWS:
        return f"<p>{len(layers):,} layers of {experts:,} experts are too many for a table; see telemetry.jsonl.</p>"
    idle = {tuple(pair) for pair in run.last["experts_without_token"]}
    tables = []
    for row, layer in enumerate(layers):
        number = layer["layer"]
        widths = [f"{width:,}" for width in run.plan.widths[row]] if run.plan else ["?"] * experts
        rows = [
            (str(e), widths[e], f"{tokens:.2%}", f"{flops:.2%}", "no token" if (number, e) in idle else "")
            for e, (tokens, flops) in enumerate(zip(layer["token_share"], layer["flops_share"], strict=True))
        ]
        idle_here = sum(bool(cells[-1]) for cells in rows)
        summary = (
            f"Layer {number}: {layer['experts_per_token']:.2f} experts a token, rank max/mean "
            f"FLOPs {layer['flops_balance']:.2f}, tokens {layer['token_balance']:.2f}"
            + (f", experts without a token: {idle_here}" if idle_here else "")
        )
        tables.append(layer_table(row, summary, HEADS, rows, "idle"))
    return "\n".join(tables)
