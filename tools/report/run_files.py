"""What a training run left in its directory, read as untrusted input and kept small.

Legend: N logged steps, L MoE layers, E logical experts.
"""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from hmoe_megatron.files import PLAN_FILE, REPLANS_FILE, RUN_SOFTWARE_FILE, TELEMETRY_FILE, read_text
from hmoe_megatron.placement.plan import PlacementPlan
from hmoe_megatron.placement.plan_checks import MAX_FILE_BYTES
from hmoe_megatron.telemetry.reader import BALANCES, open_with_remedy, read_changes, read_records
from hmoe_megatron.tools.report.scalars import Scalars
from hmoe_megatron.untrusted import parsed

MAX_NUMBERS = 1 << 26  # kept of all lines together: 0.5 GiB
MAX_SOFTWARE_BYTES, MAX_COMMIT = 1 << 16, 80


@dataclass(frozen=True)
class Run:
    """Experts go from narrow to wide; in their own order where widths are not known.

    expert_E: logical experts in that order; width_E: their widths, mean over layers, or None. share_NE: of the routed
    tokens, sums to 1, and ratio_NE: of all tokens, sums to the experts a token, both mean over layers. active_N:
    parameters a token activates, of total_parameters; active_NL: of these in the experts of layer_L. balance: name of
    BALANCES -> busiest rank over mean of the ranks, [N]. last: the last record. tokens_per_s: median over records, None
    where none has it. commit: of the code that ran, or None. losses: TensorBoard's, by tag. changes: of the plan while
    training, as replans.jsonl has them.
    """

    iteration_N: np.ndarray
    expert_E: np.ndarray
    width_E: np.ndarray | None
    share_NE: np.ndarray
    ratio_NE: np.ndarray
    active_N: np.ndarray
    total_parameters: float
    layer_L: np.ndarray
    active_NL: np.ndarray
    balance: dict[str, np.ndarray]
    last: dict
    plan: PlacementPlan | None
    tokens_per_s: float | None
    commit: str | None
    losses: Scalars = field(default_factory=dict)
    changes: list[dict] = field(default_factory=list)


def read_run(directory: Path, notes: list[str]) -> Run:
    """Without the losses. What is missing or left out is said in `notes`. Raises ValueError with file, line where there
    is one, and remedy."""
    path, rows, speeds = directory / TELEMETRY_FILE, [], []
    for number, last in read_records(path, notes):
        layers = last["layers"]
        speeds += [last["tokens_per_s"]] if "tokens_per_s" in last else []
        share_LE = np.array([layer["token_share"] for layer in layers])
        chosen_L = np.array([layer["experts_per_token"] for layer in layers])
        active_L = [layer["activated_expert_parameters"] for layer in layers]
        ratio_LE = chosen_L[:, None] * share_LE
        first = [last["iteration"], last["activated_parameters"], *(last[name] for name in BALANCES)]
        rows.append(np.concatenate([first, share_LE.mean(0), ratio_LE.mean(0), active_L]))
        if len(rows) * rows[-1].size > MAX_NUMBERS:
            raise ValueError(f"{path}:{number}: more than {MAX_NUMBERS} numbers up to here; keep every tenth line")
    experts = share_LE.shape[1]
    ends = np.cumsum([len(first), experts, experts])
    first_NX, share_NE, ratio_NE, active_NL = np.split(np.stack(rows), ends, axis=1)
    plan = _read_plan(directory / PLAN_FILE, share_LE.shape, notes)
    width_E = np.mean(plan.widths, axis=0) if plan else None
    expert_E = np.argsort(width_E, kind="stable") if plan else np.arange(experts)
    return Run(
        iteration_N=first_NX[:, 0].astype(int),
        expert_E=expert_E,
        width_E=width_E[expert_E] if plan else None,
        share_NE=share_NE[:, expert_E],
        ratio_NE=ratio_NE[:, expert_E],
        active_N=first_NX[:, 1],
        total_parameters=last["total_parameters"],
        layer_L=np.array([layer["layer"] for layer in layers]),
        active_NL=active_NL,
        balance=dict(zip(BALANCES, first_NX.T[2:], strict=True)),
        last=last,
        plan=plan,
        tokens_per_s=float(np.median(speeds)) if speeds else None,
        changes=_read_changes(directory / REPLANS_FILE, notes),
        commit=_read_commit(directory / RUN_SOFTWARE_FILE),
    )


def _read_changes(path: Path, notes: list[str]) -> list[dict]:
    return [record for _, record in read_changes(path, notes)] if path.exists() else []


def _read_commit(path: Path) -> str | None:
    if not path.exists():
        return None
    try:
        found = parsed("software of a run", read_text(path, MAX_SOFTWARE_BYTES), MAX_SOFTWARE_BYTES)
    except ValueError as error:
        raise ValueError(f"{path}: {error}; remove it, and the report leaves the commit out") from None
    return str(found["commit"])[:MAX_COMMIT] if isinstance(found, dict) and found.get("commit") else None


def _read_plan(path: Path, shape: tuple[int, int], notes: list[str]) -> PlacementPlan | None:
    """The plan of a run of this (layers, experts), or None."""
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
