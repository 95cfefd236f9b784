"""Megatron's losses from TensorBoard's event files."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from google.protobuf.message import DecodeError
from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader

from hmoe_megatron.config import LOSS_NAMES
from hmoe_megatron.telemetry.reader import MAX_ITERATION

TRAINING, VALIDATION = "lm loss", "lm loss validation"
TAGS = (TRAINING, VALIDATION, *LOSS_NAMES)


@dataclass(frozen=True)
class Curve:
    """y at iterations x, both [N]."""

    x: np.ndarray
    y: np.ndarray


Scalars = dict[str, Curve]


def read_scalars(directory: Path, notes: list[str]) -> Scalars:
    """Those of TAGS that the event files of a directory hold, none empty. Adds a sentence to notes for what is missing.

    Not by EventAccumulator: it holds every tag, and telemetry writes two for each expert of each layer.
    """
    points = {tag: {} for tag in TAGS}
    files = sorted(path for path in directory.glob("*tfevents*") if path.is_file()) if directory.is_dir() else []
    for path in files:
        for tag, found in _points(path).items():
            # A resumed run does steps again: what it says replaces what the run before it said from there on.
            kept = {step: value for step, value in points[tag].items() if step < min(found)}
            points[tag] = kept | found
    curves = {tag: _finite(tag, found, notes) for tag, found in points.items() if found}
    for tag in (TRAINING, VALIDATION):
        if tag not in curves:
            where = "no event files" if not files else f"no scalar \u201c{tag}\u201d"
            notes.append(f"No {'training' if tag == TRAINING else 'validation'} loss: {where} in {directory}.")
    return {tag: curve for tag, curve in curves.items() if len(curve.x)}


def _points(path: Path) -> dict[str, dict[int, float]]:
    """Tag -> step -> value, of one file.

    The first value of a step stays: at the last step Megatron writes the test loss under the validation loss's name.
    """
    points = {}
    try:
        for event in LegacyEventFileLoader(str(path)).Load():
            for value in event.summary.value:
                if value.tag in TAGS and value.HasField("simple_value"):
                    if not 0 <= event.step <= MAX_ITERATION:
                        raise ValueError(f"iteration {event.step}")
                    points.setdefault(value.tag, {}).setdefault(event.step, value.simple_value)
    except (DecodeError, OSError, ValueError) as error:
        raise ValueError(f"{path}: not read as a TensorBoard event file ({error}); remove it") from None
    return points


def _finite(tag: str, points: dict[int, float], notes: list[str]) -> Curve:
    x, y = (np.array(column) for column in zip(*sorted(points.items()), strict=True))
    finite = np.isfinite(y)
    if not finite.all():
        notes.append(
            f"{np.sum(~finite)} values of \u201c{tag}\u201d are not finite, the first at iteration "
            f"{x[~finite][0]}; they are left out."
        )
    return Curve(x[finite], y[finite])
