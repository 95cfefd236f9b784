"""The routing report: over training from telemetry; of text and questions from the last checkpoint, which reads them.

Tokens come from untrusted text: escaped, and all that is not plainly visible is written as an escape sequence, so that
no control character acts in the browser.
"""

import argparse
import contextlib
import sys
import unicodedata
from collections.abc import Callable
from functools import partial
from html import escape
from pathlib import Path

import numpy as np

from hmoe_megatron.files import TELEMETRY_FILE
from hmoe_megatron.tools.report import routing_pictures, statistics, training_pictures
from hmoe_megatron.tools.report.drawing import Drawn, draw
from hmoe_megatron.tools.report.page import MAX_ROWS, figures, html_page, layer_table, write_files
from hmoe_megatron.tools.report.run_files import read_run
from hmoe_megatron.tools.report.run_page import parameter_facts
from hmoe_megatron.tools.report.statistics import Model, Routing
from hmoe_megatron.tools.report.text import question_windows, read_documents, read_questions, text_windows

PAGE_FILE = "report.html"
MAX_TOKEN_CHARS = 32  # of a token that is shown
LEAST, MOST = 5, 12  # occurrences of a token among an expert's top tokens; how many are shown
SPACE = "\u2423"
OVER_TRAINING = {
    "activated_ratio_over_training.png": training_pictures.activated_ratio,
    "activated_parameters_over_training.png": training_pictures.activated_parameters,
}
ON_TEXT = {
    "activated_ratio_by_layer.png": routing_pictures.ratio_by_layer,
    "activated_parameters_by_layer.png": routing_pictures.parameters_by_layer,
    "similarity.png": routing_pictures.similarity,
    "synergy.png": routing_pictures.synergy,
    "difficulty.png": routing_pictures.difficulty,
}
ON_QUESTIONS = {"easy_and_hard.png": routing_pictures.easy_and_hard}
PICTURES = OVER_TRAINING | ON_TEXT | ON_QUESTIONS


def write_report(args: argparse.Namespace) -> list[Path]:
    """From the flags of tools/routing_report.py to the files written, the page first.

    Raises ValueError, RunEnded and OSError, all but what only the checkpoint can show before the model is loaded.
    """
    notes, facts, sections, drawn = [], {}, [], {}
    if (args.load / TELEMETRY_FILE).exists():
        run = read_run(args.load, notes)
        drawn = draw(OVER_TRAINING, run)
        facts = parameter_facts(run) | {"last logged step": f"{run.iteration_N[-1]:,}"}
        sections.append(("Over training", figures(drawn)))
    else:
        notes.append(f"No {TELEMETRY_FILE} in the run directory: the figures over training are left out.")
    if not args.text:
        notes.append("No --text was given: the figures of the checkpoint's routing are left out.")
    if not args.easy:
        notes.append("No --easy and --hard were given: the figure of easy and hard questions is left out.")
    if args.text or args.easy:
        # Megatron prints, from its import on; standard output is for the files' names.
        with contextlib.redirect_stdout(sys.stderr):
            more_facts, more_sections, more = _from_checkpoint(args)
        facts, sections, drawn = facts | more_facts, sections + more_sections, drawn | more
    html = html_page(f"HMoE routing: {args.load.absolute().name}", facts, notes, sections)
    return write_files(args.output / PAGE_FILE, html, args.output, drawn, PICTURES)


def _from_checkpoint(args: argparse.Namespace) -> tuple[dict[str, str], list[tuple[str, str]], Drawn]:
    """(facts, sections, pictures) of text and questions."""
    questions = [(path, read_questions(path)) for path in (args.easy, args.hard) if path]
    from hmoe_megatron import machine

    machine.prepare_environment()
    from hmoe_megatron import training
    from hmoe_megatron.checkpoint.directory import find
    from hmoe_megatron.hf.one_process import load_model
    from hmoe_megatron.tools.report import routing

    training.prepare()
    iteration, _ = find(args.load)
    tokenizer, context = routing.run_tokenizer(args.load, args.flags)
    text = args.text and text_windows(read_documents(args.text), tokenizer, context, args.tokens)
    asked = [question_windows(path, texts, tokenizer, context) for path, texts in questions]
    loaded = load_model(args.load, args.flags)
    model, facts, sections, drawn = routing.facts(loaded), {}, [], {}
    if text:
        of_text = routing.collect(loaded, text, "text")
        facts, drawn = text_facts(iteration, of_text), draw(ON_TEXT, model, of_text)
        tokens = top_tokens(model, of_text, partial(routing.token_texts, tokenizer))
        sections = [("On text", figures(drawn)), ("Top tokens", tokens)]
    if asked:
        of_both = draw(ON_QUESTIONS, model, *(routing.collect(loaded, windows, "questions") for windows in asked))
        sections.append(("Easy and hard questions", figures(of_both)))
        drawn |= of_both
    return facts, sections, drawn


def text_facts(iteration: int, routing: Routing) -> dict[str, str]:
    return {
        "checkpoint of step": f"{iteration:,}",
        "tokens of text": f"{len(routing.token_T):,}",
        "loss on them": f"{np.nanmean(routing.loss_T):.3f} nats",
        "experts a token": f"{routing.chosen_TLE.sum(2).mean():.2f}",
    }


def visible(token: str) -> str:
    """The token, not yet escaped for HTML, with its spaces, control, format and unassigned characters made visible."""
    shown = token[:MAX_TOKEN_CHARS].replace(" ", SPACE)
    letters = (c if unicodedata.category(c)[0] not in "CZ" else c.encode("unicode_escape").decode() for c in shown)
    return "".join(letters) + "\u2026" * (len(token) > MAX_TOKEN_CHARS)


def top_tokens(model: Model, routing: Routing, texts_of: Callable) -> str:
    """A table of each layer. texts_of: token ids -> their texts."""
    if model.width_LE.size > MAX_ROWS:
        return f"<p>{model.width_LE.size:,} experts are too many for tables.</p>"
    heads = ("expert", "width", "share of all tokens", "top tokens, and the share of each that chose the expert")
    tables = [
        f"<p>Of the tokens that occur in the text {LEAST} times or more those of which the largest share chose the "
        f"expert; {SPACE} is a space.</p>"
    ]
    for place, layer in enumerate(model.layer_L):
        chosen_TE = routing.chosen_TLE[:, place]
        ids_U, total_U, counts_EU = statistics.token_counts(routing.token_T, chosen_TE)
        top = statistics.top_tokens(counts_EU, total_U, LEAST, MOST)
        known = sorted({u for tokens in top for u, _ in tokens})
        texts = dict(zip(known, (escape(visible(text)) for text in texts_of(ids_U[known])), strict=True))
        rows = []
        for expert in model.expert_E:
            tokens = " ".join(f"<span><code>{texts[u]}</code>&nbsp;{ratio:.0%}</span>" for u, ratio in top[expert])
            width, share = model.width_LE[place, expert], chosen_TE[:, expert].mean()
            rows.append((str(expert), f"{width:,}", f"{share:.2%}", tokens))
        tables.append(layer_table(place, f"Layer {layer}", heads, rows, "tokens"))
    return "\n".join(tables)
