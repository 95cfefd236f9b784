"""How a rank's pieces lie in its two weights: one behind the other, W the sum of their widths.

    fc1 [2 W, H]  a piece of width F is 2 F rows, gate above up
    fc2 [W, H]    a piece is F H numbers, in memory its matrix [H, F]

The same holds for all that has the shape of a weight: gradients, Megatron's main_grad, optimizer states.
"""

import torch


def fc1_pieces(fc1: torch.Tensor, widths) -> list[torch.Tensor]:
    """Views [2 F, H], one a piece."""
    return list(fc1.split([2 * width for width in widths]))


def fc2_pieces(fc2: torch.Tensor, widths) -> list[torch.Tensor]:
    """Views [H, F], one a piece."""
    return [block.view(fc2.shape[1], width) for block, width in zip(fc2.split(list(widths)), widths, strict=True)]


MATRICES = {"linear_fc1_weight": fc1_pieces, "linear_fc2_weight": fc2_pieces}
