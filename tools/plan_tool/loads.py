"""Measured loads from JSON lines: a run's telemetry.jsonl, or counts of any trainer. Untrusted input.

A line of counts is {"tokens": [[m, ...], ...]}: rows of each expert of each MoE layer in one micro-batch of the
expert-parallel group. Letters: L MoE layers, E logical experts.
"""

import codecs
import re
from collections import deque
from pathlib import Path

import numpy as np

from hmoe_megatron.placement.planner import MAX_TOKENS
from hmoe_megatron.telemetry.reader import MAX_LINE_BYTES, open_with_remedy, read_records
from hmoe_megatron.tools.plan_tool.model import Model
from hmoe_megatron.untrusted import parsed

_REMEDY = 'give telemetry.jsonl of a run, or lines {"tokens": [[rows of each expert], ... of each layer]}'


def mean_loads(path: Path, model: Model, last: int, notes: list[str]) -> list[np.ndarray]:
    """tokens_LE of one micro-batch, the mean over the `last` lines. Raises ValueError with file, line and remedy."""
    with open_with_remedy(path, _REMEDY) as file:
        first = file.readline(MAX_LINE_BYTES + 1).removeprefix(codecs.BOM_UTF8)
    read = _counts if re.match(rb'\s*{\s*"tokens"', first) else _telemetry
    kept = deque(read(path, model, notes), maxlen=last)
    if not kept:
        raise ValueError(f"{path}: holds no whole line; {_REMEDY}")
    notes.append(f"loads: the mean of the last {len(kept)} lines of {path}")
    loads = [np.mean(of_steps, axis=0) for of_steps in zip(*kept, strict=True)]
    if (found := [load.size for load in loads]) != (wanted := [len(widths) for widths in model.widths_LE]):
        raise ValueError(
            f"{path}: experts of each layer {_short(found)}, of the model {_short(wanted)}: give the "
            "flags of the model that was measured"
        )
    return loads


def _telemetry(path: Path, model: Model, notes: list[str]):
    for number, record in read_records(path, notes):
        layers = record["layers"]
        if len(layers) != len(model.widths_LE):
            raise ValueError(
                f"{path}:{number}: {len(layers)} MoE layers, the model has {len(model.widths_LE)}: give "
                "the flags of the model that was measured"
            )
        yield [model.tokens * layer["experts_per_token"] * np.array(layer["token_share"]) for layer in layers]


def _counts(path: Path, model: Model, notes: list[str]):
    with open_with_remedy(path, _REMEDY) as file:
        number = 0
        while line := file.readline(MAX_LINE_BYTES + 1):
            number += 1
            line = line.removeprefix(codecs.BOM_UTF8)
            if not line.strip():
                continue
            try:
                yield _counts_of(line, [len(widths) for widths in model.widths_LE])
            except ValueError as error:
                if not line.endswith((b"\n", b"}")):
                    notes.append(f"{path.name} ends in the middle of line {number}, which is left out.")
                    return
                raise ValueError(f"{path}:{number}: {str(error)[:200]}; {_REMEDY}") from None


def _counts_of(line: bytes, experts_L: list[int]) -> list[np.ndarray]:
    value = parsed("a line of counts", line.decode(), MAX_LINE_BYTES)
    counts = value.get("tokens") if type(value) is dict and len(value) == 1 else None
    if type(counts) is not list or not all(type(of) is list for of in counts):
        raise ValueError('not an object with lists under "tokens" alone')
    if [len(of) for of in counts] != experts_L:
        raise ValueError(f"experts by layer {_short([len(of) for of in counts])}, of the model {_short(experts_L)}")
    if not all(type(m) in (int, float) and 0 <= m <= MAX_TOKENS for of in counts for m in of):
        raise ValueError(f"a count is not a number from 0 to {MAX_TOKENS:g}")
    return [np.array(of, dtype=float) for of in counts]


def _short(numbers: list[int]) -> str:
    return f"{numbers!s:.80}"
