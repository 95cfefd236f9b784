"""One model after the other, each in a process of its own: Megatron's state is global, and memory comes back."""

import contextlib
import multiprocessing
import sys
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass

from hmoe_megatron.child_process import end_with_parent
from hmoe_megatron.evaluation.inputs import Source, go_offline


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
    from hmoe_megatron.evaluation.models import open_model
    from hmoe_megatron.evaluation.scoring import Limits
    from hmoe_megatron.evaluation.texts import evaluate_text

    tasks, texts = {}, {}
    try:
        model = open_model(source)
        limits = Limits(work.context or model.context, work.stride, work.batch_tokens)
        for flag, value, most in (("context", work.context, model.context), ("stride", work.stride, limits.context)):
            if (value or 0) > most:
                raise ValueError(f"--{flag} {value}: it sees {most} tokens: give at most that")
        if work.rows:
            from hmoe_megatron.evaluation.harness import evaluate_tasks

            tasks = evaluate_tasks(model, work.rows, limits, work.limit)
        for text, documents in work.texts.items():
            texts[text] = asdict(evaluate_text(model, documents, limits, text))
    except ValueError as error:
        raise ValueError(f"--{source.kind} {source.path}: {error}") from error
    return {"kind": source.kind, "path": source.path, "context": limits.context, "vocabulary": model.vocabulary,
            **model.facts, "tasks": tasks, "texts": texts}  # fmt: skip


def evaluate_apart(source: Source, work: Work) -> dict:
    """`evaluate` in a new process. Raises ValueError."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, context, initializer=_start) as pool:
        try:
            return pool.submit(_evaluate_quietly, source, work).result()
        except BrokenProcessPool:
            raise ValueError(f"--{source.kind} {source.path}: its process died, perhaps for want of memory: "
                             "give fewer --batch-tokens") from None  # fmt: skip


def _start() -> None:
    end_with_parent()
    go_offline()


def _evaluate_quietly(source: Source, work: Work) -> dict:
    try:
        with contextlib.redirect_stdout(sys.stderr):  # Megatron's set-up talks; standard output is for the table
            return evaluate(source, work)
    except ValueError as error:
        raise ValueError(str(error)) from None  # its cause may not survive the way to the other process
