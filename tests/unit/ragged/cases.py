"""Layers for Triton's interpreter: small tiles, so that a small layer has whole ones, cut ones and several programs."""

import os

import pytest
import torch

from hmoe_megatron.moe.compute.ragged.self_test import Case
from hmoe_megatron.moe.compute.ragged.tiles import Tile, Tiles

INTERPRETED = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="for machines without a GPU; tests/gpu runs the kernels there"
)


def tiles(rows=16, columns=32, depth=16, flat=False) -> Tiles:
    """The same for every product. ``flat``: of the weight gradients."""
    tile, weights = Tile(rows, columns, depth), Tile(rows, columns, depth, flat=flat)
    return Tiles(
        up=tile, down=tile, hidden_grad=tile, input_grad=tile, fc1_grad=weights, fc2_grad=weights, activation=columns
    )


def backend(ragged, chosen: Tiles, keep_hidden=False):
    """ExpertCompute of these tiles. ragged: the package, or a copy of it with a bug."""

    def compute(x, probs, rows, fc1, fc2, widths):
        layer = ragged.schedule.Layer(widths, x.shape[1], chosen, x.device)
        elements = sum(count * width for count, width in zip(rows, widths, strict=True))
        return ragged.experts.ragged_swiglu(x, probs, fc1, fc2, torch.tensor(rows), layer, elements, keep_hidden)

    return compute


# The cases that planted bugs must fail in, and then more.
QUICK = {
    "widest first, none, one row": Case(24, (40, 16, 24), (18, 0, 1)),
    "widest last, added": Case(24, (16, 24, 56), (17, 0, 3), accumulate=True),
}
MORE = {
    "multiples of 32": Case(64, (96, 32, 160), (33, 1, 20)),
    "multiples of 32, added": Case(40, (96, 160, 32), (33, 0, 9), accumulate=True),
    "no column is masked": Case(64, (64, 128, 192), (40, 0, 17)),
    "64 pieces": Case(16, tuple(8 * (1 + 5 * e % 4) for e in range(64)), tuple(3 * e % 5 for e in range(64))),
    "one piece": Case(32, (72,), (37,)),
    "all rows on the narrowest": Case(48, (96, 32, 64), (0, 37, 0)),
    "all rows on the widest": Case(48, (96, 32, 64), (37, 0, 0)),
    "no rows": Case(48, (32, 96), (0, 0)),
    "no rows, added": Case(48, (32, 96), (0, 0), accumulate=True),
    "widths of 8 times odd numbers": Case(32, (8, 88, 24, 56), (5, 16, 33, 2)),
    "fewer tiles than programs": Case(16, (16, 16), (3, 2)),
}
