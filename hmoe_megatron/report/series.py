"""The arrays that the pictures draw. Pure.

Legend: N logged steps, L MoE layers, E logical experts.
"""

from dataclasses import dataclass

import numpy as np

from hmoe_megatron.report.run_files import Run
from hmoe_megatron.report.scalars import AUXILIARY, TRAINING, VALIDATION, Curve


@dataclass(frozen=True)
class Series:
    """losses, auxiliary: name -> curve, only those that the run has, none empty.

    expert_E: logical experts from narrow to wide (in their own order where widths are not known); width_E: their
    widths, mean over layers, or None; share_NE: their shares of routed tokens, mean over layers, sums to 1.
    active_N: parameters a token activates, of total_parameters; active_NL: of these in the experts of layer_L.
    balance: what is balanced -> max over mean over ranks, [N].
    """

    losses: dict[str, Curve]
    auxiliary: dict[str, Curve]
    iteration_N: np.ndarray
    expert_E: np.ndarray
    width_E: np.ndarray | None
    share_NE: np.ndarray
    active_N: np.ndarray
    total_parameters: float
    layer_L: np.ndarray
    active_NL: np.ndarray
    balance: dict[str, np.ndarray]


def series(run: Run) -> Series:
    """What is drawn of a run."""
    curves = {tag: curve for tag, curve in run.scalars.items() if len(curve.x)}
    width_E = np.mean(run.plan.widths, axis=0) if run.plan else None
    expert_E = np.arange(run.share_NE.shape[1]) if width_E is None else np.argsort(width_E, kind="stable")
    labels = {"flops_balance": "FLOPs", "token_balance": "tokens", "time_balance": "measured expert time"}
    return Series(
        losses={name: curves[tag] for name, tag in (("training", TRAINING), ("validation", VALIDATION))
                if tag in curves},
        auxiliary={tag: curves[tag] for tag in AUXILIARY if tag in curves},
        iteration_N=run.iteration_N,
        expert_E=expert_E,
        width_E=None if width_E is None else width_E[expert_E],
        share_NE=run.share_NE[:, expert_E],
        active_N=run.active_N,
        total_parameters=run.last["total_parameters"],
        layer_L=np.array([layer["layer"] for layer in run.last["layers"]]),
        active_NL=run.active_NL,
        balance={label: run.balance[name] for name, label in labels.items()},
    )
