"""What a backend of the experts' compute is.

Legend: R routed rows of this rank, sorted by piece; H hidden size; F width of one piece (its tensor-parallel share),
W of all.
"""

from collections.abc import Sequence
from typing import Protocol

import torch


class ExpertCompute(Protocol):
    """For each piece y = W2 (p * silu(Wg x) * (Wu x)), forward and backward, with any number of rows, none included; a
    piece without rows gets exactly zero weight gradient."""

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
