"""What tools/routing_report.py does: read, check, load, collect, draw, write."""

import argparse
import contextlib
import sys
from functools import partial
from pathlib import Path

from hmoe_megatron.files import TELEMETRY_FILE, atomic_write
from hmoe_megatron.routing_report import page, pictures
from hmoe_megatron.routing_report.over_training import read_training
from hmoe_megatron.routing_report.text import (
    MIN_TOKENS,
    question_windows,
    read_documents,
    read_questions,
    text_windows,
)

DEFAULT_TOKENS = 65_536
PAGE_FILE = "report.html"


def check(args: argparse.Namespace) -> None:
    """Raises ValueError for flags that don't go together and directories that are none."""
    if not args.load.is_dir():
        raise ValueError(f"--load {args.load}: no such directory; give what --save of a run named")
    if args.output.exists() and not args.output.is_dir():
        raise ValueError(f"--output {args.output}: is a file; give a directory, which is made if it is missing")
    if args.tokens is not None and args.tokens < MIN_TOKENS:
        raise ValueError(f"--tokens {args.tokens}: give {MIN_TOKENS} at least, or the figures would be noise")
    if args.tokens is not None and not args.text:
        raise ValueError(f"--tokens {args.tokens}: of what? give --text")
    if bool(args.easy) != bool(args.hard):
        given, missing = ("--easy", "--hard") if args.easy else ("--hard", "--easy")
        raise ValueError(f"{given} needs {missing}: the figure sets one beside the other")
    for path in [*args.text, args.easy, args.hard]:
        if path and not path.is_file():
            raise ValueError(f"{path}: no such file; give the path of a file")
    if not (args.text or args.easy or (args.load / TELEMETRY_FILE).exists()):
        raise ValueError(f"--load {args.load}: no {TELEMETRY_FILE} is there, and no --text and no --easy and --hard "
                         "are given: there is nothing to draw")  # fmt: skip


def report(args: argparse.Namespace) -> list[Path]:
    """The files written, the page first. Raises ValueError, RunEnded and OSError, all but what only the checkpoint can
    tell before the model is loaded."""
    check(args)
    notes, facts, sections, pngs = [], {}, [], {}
    if (args.load / TELEMETRY_FILE).exists():
        training = read_training(args.load, notes)
        drawn = pictures.draw_training(training)
        facts |= page.training_facts(training)
        sections.append(("Over training", page.figures(drawn)))
        pngs |= drawn
    else:
        notes.append(f"No {TELEMETRY_FILE} in the run directory: the figures over training are left out.")
    if not args.text:
        notes.append("No --text was given: the figures of the checkpoint's routing are left out.")
    if not args.easy:
        notes.append("No --easy and --hard were given: the figure of easy and hard questions is left out.")
    if args.text or args.easy:
        # Megatron talks, from its import on; standard output is for the files' names.
        with contextlib.redirect_stdout(sys.stderr):
            more_facts, more_sections, drawn = _from_checkpoint(args)
        facts |= more_facts
        sections += more_sections
        pngs |= drawn
    html = page.page(f"HMoE routing: {args.load.absolute().name}", facts, notes, sections)
    return write(args.output, html, pngs)


def _from_checkpoint(args: argparse.Namespace) -> tuple[dict, list, dict]:
    """(facts, sections, pictures) of text and questions."""
    questions = [(path, read_questions(path)) for path in (args.easy, args.hard) if path]
    from hmoe_megatron import machine

    machine.prepare_environment()
    from hmoe_megatron import training
    from hmoe_megatron.checkpoint.directory import find
    from hmoe_megatron.generation import load_model
    from hmoe_megatron.routing_report import collect

    training.prepare()
    iteration, _ = find(args.load)
    tokenizer, context = collect.run_tokenizer(args.load, args.flags)
    text = args.text and text_windows(read_documents(args.text), tokenizer, context, args.tokens, DEFAULT_TOKENS)
    asked = [question_windows(path, texts, tokenizer, context) for path, texts in questions]
    model = load_model(args.load, args.flags)
    known = collect.facts(model)
    routing = collect.collect(model, text, "text") if text else None
    routings = [collect.collect(model, windows, "questions") for windows in asked]
    facts, sections, pngs = {}, [], {}
    if routing:
        facts = page.text_facts(iteration, routing)
        pngs = pictures.draw_text(known, routing)
        top = page.top_tokens(known, routing, partial(collect.token_texts, tokenizer))
        sections = [("On text", page.figures(pngs)), ("Top tokens", top)]
    if routings:
        drawn = pictures.draw_questions(known, *routings)
        sections.append(("Easy and hard questions", page.figures(drawn)))
        pngs |= drawn
    return facts, sections, pngs


def write(output: Path, html: bytes, pngs: dict[str, bytes]) -> list[Path]:
    """Each file whole or not at all, the page last. A picture of an earlier report that this one lacks goes."""
    output.mkdir(parents=True, exist_ok=True)
    for name in page.CAPTIONS.keys() - pngs.keys():
        (output / name).unlink(missing_ok=True)
    files = {output / name: png for name, png in pngs.items()} | {output / PAGE_FILE: html}
    for path, content in files.items():
        atomic_write(path, content)
    return [output / PAGE_FILE, *(output / name for name in pngs)]
