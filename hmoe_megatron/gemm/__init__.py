"""Compute of one rank's expert pieces: one signature, several backends.

Legend: R routed rows of this rank, sorted by piece; H hidden size; F width of one piece (its tensor-parallel share),
W of all.
Every backend computes, for each piece, y = W2 (p * silu(Wg x) * (Wu x)), forward and backward, with any number of rows,
none included, and gives exactly zero weight gradient to a piece without rows.
"""

from collections.abc import Sequence
from typing import Protocol

import torch

from hmoe_megatron.gemm.cpu import cpu_experts
from hmoe_megatron.gemm.reference import reference_experts


class ExpertCompute(Protocol):
    """What a backend is."""

    def __call__(
        self,
        x_RH: torch.Tensor,
        probs_R: torch.Tensor,
        rows: list[int],
        fc1: torch.Tensor,
        fc2: torch.Tensor,
        widths: Sequence[int],
    ) -> torch.Tensor:
        """Outputs of all rows, [R, H] in the dtype of x_RH.

        probs_R: router probability of each row, float32 or the dtype of x. rows: rows of each piece, summing to R.
        fc1 [2 W, H], fc2 [W, H]: all pieces (see flat.py). widths: F of each. Under expert tensor parallelism the
        result is this rank's partial sum, reduced by the dispatcher.
        """
        ...


def expert_compute(name: str, has_gpu: bool) -> ExpertCompute:
    """The backend of ``--hmoe-gemm-backend``. Raises ValueError for one that this machine should not use."""
    if name == "auto":
        name = "reference" if has_gpu else "cpu"
    if name == "cpu" and has_gpu:
        raise ValueError("--hmoe-gemm-backend cpu on a machine with a GPU: use auto or reference")
    return {"reference": reference_experts, "cpu": cpu_experts}[name]
