"""What a training run left in its directory, read as untrusted input and kept small.

Legend: N logged steps, L MoE layers, E logical experts.
"""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from hmoe_megatron.files import PLAN_FILE, TELEMETRY_FILE
from hmoe_megatron.placement.plan import PlacementPlan
from hmoe_megatron.placement.plan_checks import MAX_FILE_BYTES
from hmoe_megatron.report.scalars import Scalars, read_scalars
from hmoe_megatron.telemetry.reader import BALANCES, open_with_remedy, read_records

MAX_NUMBERS = 1 << 26  # kept of all lines together: 0.5 GiB


@dataclass(frozen=True)
class Run:
    """iteration_N; share_NE: of a layer's routed tokens, mean over layers; active_N: parameters a token activates;
    active_NL: of these in the experts of each layer; balance: name of BALANCES -> max over mean over ranks, [N];
    last: the last record. notes: sentences about what was missing or left out."""

    directory: Path
    iteration_N: np.ndarray
    share_NE: np.ndarray
    active_N: np.ndarray
    active_NL: np.ndarray
    balance: dict[str, np.ndarray]
    last: dict
    plan: PlacementPlan | None
    scalars: Scalars
    notes: list[str] = field(default_factory=list)


def read_run(directory: Path, tensorboard_dir: Path) -> Run:
    """Raises ValueError with file, line where there is one, and remedy."""
    notes = []
    records = _read_telemetry(directory / TELEMETRY_FILE, notes)
    last = records.pop("last")
    shape = (len(last["layers"]), len(last["layers"][0]["token_share"]))
    plan = read_plan(directory / PLAN_FILE, shape, notes)
    return Run(directory, **records, last=last, plan=plan, scalars=read_scalars(tensorboard_dir, notes), notes=notes)


def read_plan(path: Path, shape: tuple[int, int], notes: list[str]) -> PlacementPlan | None:
    """The plan of a run of this (layers, experts), or None, which is said in `notes`. Raises ValueError."""
    if not path.exists():
        notes.append(f"No {PLAN_FILE} in the run directory: the widths of the experts are not known here.")
        return None
    remedy = "a training run writes it; without it the report leaves the widths out"
    with open_with_remedy(path, remedy) as file:
        text = file.read(MAX_FILE_BYTES + 1)
    try:
        plan = PlacementPlan.from_json(text.decode())
        planned = sorted({(len(plan.layers), len(widths)) for widths in plan.widths})
        if planned != [shape]:
            raise ValueError(
                f"made for (layers, experts) {planned!s:.80}, but {TELEMETRY_FILE} beside it has {shape}: they are "
                f"of different runs"
            )
    except ValueError as error:  # also not UTF-8
        raise ValueError(f"{path}: {error}; {remedy}") from None
    return plan


def _read_telemetry(path: Path, notes: list[str]) -> dict:
    rows = []
    for number, last in read_records(path, notes):
        rows.append(_row(last))
        if len(rows) * rows[-1].size > MAX_NUMBERS:
            raise ValueError(f"{path}:{number}: more than {MAX_NUMBERS} numbers up to here; keep every tenth line")
    table = np.stack(rows)
    experts = len(last["layers"][0]["token_share"])
    return {
        "iteration_N": table[:, 0].astype(int),
        "active_N": table[:, 1],
        "balance": {name: table[:, 2 + column] for column, name in enumerate(BALANCES)},
        "share_NE": table[:, 5 : 5 + experts],
        "active_NL": table[:, 5 + experts :],
        "last": last,
    }


def _row(record: dict) -> np.ndarray:
    """What is drawn of a step: iteration, activated parameters, balances, shares [E], active parameters [L]."""
    layers = record["layers"]
    share_E = np.mean([layer["token_share"] for layer in layers], axis=0)
    active_L = [layer["activated_expert_parameters"] for layer in layers]
    first = [record["iteration"], record["activated_parameters"], *(record[name] for name in BALANCES)]
    return np.concatenate([first, share_E, active_L])
