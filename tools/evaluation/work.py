"""One model after the other, each in a process of its own: Megatron's state is global, and memory comes back."""

import contextlib
import multiprocessing
import sys
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass

from hmoe_megatron.child_process import end_with_parent
from hmoe_megatron.tools.evaluation.inputs import Source, go_offline


@dataclass(frozen=True)
class Work:
    """What is asked of every model. rows: {benchmark: its questions}; texts: {name: documents}."""

    rows: dict[str, list[dict]]
    texts: dict[str, list[str]]
    limit: int | None = None
    context: int | None = None
    stride: int | None = None
    batch_tokens: int = 4096


def evaluate(source: Source, work: Work) -> dict:
    """All of `work` for one model. Raises ValueError."""
    try:
        with contextlib.redirect_stdout(sys.stderr):  # Megatron's set-up prints; standard output is for the table
            return {"kind": source.kind, "path": source.path, **_evaluate(source, work)}
    except ValueError as error:
        raise ValueError(f"--{source.kind} {source.path}: {error}") from None


def _evaluate(source: Source, work: Work) -> dict:
    from hmoe_megatron.tools.evaluation.harness import evaluate_tasks
    from hmoe_megatron.tools.evaluation.models import open_model
    from hmoe_megatron.tools.evaluation.scoring import Limits
    from hmoe_megatron.tools.evaluation.texts import evaluate_text

    model = open_model(source)
    limits = Limits(work.context or model.context, work.stride, work.batch_tokens)
    for flag, value, most in (("context", work.context, model.context), ("stride", work.stride, limits.context)):
        if (value or 0) > most:
            raise ValueError(f"--{flag} {value}: it sees {most} tokens: give at most that")
    tasks = evaluate_tasks(model, work.rows, limits, work.limit) if work.rows else {}
    texts = {name: evaluate_text(model, documents, limits, name) for name, documents in work.texts.items()}
    about = {"context": limits.context, "vocabulary": model.vocabulary, **model.facts}
    return {**about, "tasks": tasks, "texts": texts}


def evaluate_apart(source: Source, work: Work) -> dict:
    """`evaluate` in a new process. Raises ValueError."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), initializer=_start) as pool:
        try:
            return pool.submit(evaluate, source, work).result()
        except BrokenProcessPool:
            died = "its process died, perhaps for want of memory: give fewer --batch-tokens"
            raise ValueError(f"--{source.kind} {source.path}: {died}") from None


def _start() -> None:
    end_with_parent()
    go_offline()
