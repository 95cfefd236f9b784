"""How a rank's pieces lie in its two weights: one behind the other, W the sum of their widths.

    fc1 [2 W, H]  a piece of width F is 2 F rows, gate above up
    fc2 [W, H]    a piece is F H numbers, in memory its matrix [H, F]

The same holds for all that has the shape of a weight: gradients, Megatron's main_grad, optimizer states. Where experts
may move while training (--hmoe-replan-interval) there are more rows, which are zero and belong to no piece.
"""

import torch


def fc1_pieces(fc1: torch.Tensor, widths) -> list[torch.Tensor]:
    """Views [2 F, H], one a piece."""
    return list(fc1[: 2 * sum(widths)].split([2 * width for width in widths]))


def fc2_pieces(fc2: torch.Tensor, widths) -> list[torch.Tensor]:
    """Views [H, F], one a piece."""
    blocks = fc2[: sum(widths)].split(list(widths))
    return [block.view(fc2.shape[1], width) for block, width in zip(blocks, widths, strict=True)]


def new_gradient(weight: torch.Tensor, rows: int) -> torch.Tensor:
    """Memory for the gradient of a weight whose first ``rows`` will be written; the others are zero."""
    grad = torch.empty_like(weight)
    grad[rows:].zero_()
    return grad


MATRICES = {"linear_fc1_weight": fc1_pieces, "linear_fc2_weight": fc2_pieces}
