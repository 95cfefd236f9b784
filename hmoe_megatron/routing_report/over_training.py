"""Routing over training, from the run's telemetry.

Legend: N logged steps, L MoE layers, E logical experts.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hmoe_megatron.files import PLAN_FILE, TELEMETRY_FILE
from hmoe_megatron.report.run_files import MAX_NUMBERS, read_plan
from hmoe_megatron.telemetry.reader import read_records


@dataclass(frozen=True)
class Training:
    """ratio_NE: fraction of tokens that activate an expert, mean over layers, experts from narrow to wide by width_E
    (None: widths not known, experts in their own order). active_N: parameters a token activates, of total_parameters;
    active_NL: of these in the experts of layer_L."""

    iteration_N: np.ndarray
    ratio_NE: np.ndarray
    width_E: np.ndarray | None
    active_N: np.ndarray
    active_NL: np.ndarray
    total_parameters: float
    layer_L: np.ndarray


def read_training(run_dir: Path, notes: list[str]) -> Training:
    """Telemetry is untrusted. Raises ValueError with file, line where there is one, and remedy."""
    path, rows = run_dir / TELEMETRY_FILE, []
    for number, last in read_records(path, notes):
        rows.append(_row(last))
        if len(rows) * rows[-1].size > MAX_NUMBERS:
            raise ValueError(f"{path}:{number}: more than {MAX_NUMBERS} numbers up to here; keep every tenth line")
    table, layers = np.stack(rows), last["layers"]
    experts = len(layers[0]["token_share"])
    plan = read_plan(run_dir / PLAN_FILE, (len(layers), experts), notes)
    width_E = np.mean(plan.widths, axis=0) if plan else np.zeros(experts)
    expert_E = np.argsort(width_E, kind="stable")
    return Training(
        iteration_N=table[:, 0].astype(int),
        ratio_NE=table[:, 2 : 2 + experts][:, expert_E],
        width_E=width_E[expert_E] if plan else None,
        active_N=table[:, 1],
        active_NL=table[:, 2 + experts :],
        total_parameters=last["total_parameters"],
        layer_L=np.array([layer["layer"] for layer in layers]),
    )


def _row(record: dict) -> np.ndarray:
    """Iteration, activated parameters, ratios [E], active parameters [L]. A share of the routed tokens is a fraction
    of the tokens where it is multiplied by the experts a token."""
    layers = record["layers"]
    ratio_LE = [np.multiply(layer["token_share"], layer["experts_per_token"]) for layer in layers]
    active_L = [layer["activated_expert_parameters"] for layer in layers]
    return np.concatenate([[record["iteration"], record["activated_parameters"]], np.mean(ratio_LE, axis=0), active_L])
