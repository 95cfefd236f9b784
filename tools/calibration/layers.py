"""What is timed: the experts of one layer on one rank, as training has them.

Letters: H hidden size, m rows of an expert, w its width.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch

EQUAL_EXPERTS = 3  # of a layer to fit: several, for some time is a layer's and not an expert's
WIDTH_RATIOS = (9, 13, 19, 23)  # of a layer kept apart, and rows for them
ROW_RATIOS = (2, 5, 1, 8)


@dataclass(frozen=True)
class Layer:
    """rows[e] and widths[e] of its experts."""

    hidden_size: int
    rows: tuple[int, ...]
    widths: tuple[int, ...]


def layers_to_fit(hidden_sizes: Sequence[int], rows: Sequence[int], widths: Sequence[int]) -> list[Layer]:
    """Equal experts for each H, m and w."""
    return [Layer(H, (m,) * EQUAL_EXPERTS, (w,) * EQUAL_EXPERTS) for H in hidden_sizes for m in rows for w in widths]


def layers_kept_apart(hidden_sizes: Sequence[int], rows: Sequence[int], widths: Sequence[int]) -> list[Layer]:
    """Unequal experts whose mean m and w lie between those of the fit, for its hidden sizes and those between them."""
    return [
        Layer(H, _spread(m, ROW_RATIOS), _spread(w, WIDTH_RATIOS))
        for H in sorted({*hidden_sizes, *_between(hidden_sizes)})
        for m in _between(rows)
        for w in _between(widths)
    ]


def _between(values: Sequence[int]) -> list[int]:
    return [round((a * b) ** 0.5) for a, b in pairwise(sorted(set(values)))]


def _spread(mean: int, ratios: Sequence[int]) -> tuple[int, ...]:
    return tuple(max(1, round(mean * ratio * len(ratios) / sum(ratios))) for ratio in ratios)


def experts_run(layer: Layer, compute: Callable, device: torch.device, dtype: torch.dtype) -> Callable[[], None]:
    """A call of it is one forward and backward of the layer's experts by `compute` (see gemm.ExpertCompute)."""
    generator = torch.Generator(device).manual_seed(0)

    def draw(*shape):
        return torch.randn(shape, generator=generator, device=device, dtype=dtype)

    H, R = layer.hidden_size, sum(layer.rows)
    x_RH, probs_R, dy_RH = draw(R, H), draw(R), draw(R, H)
    fc1, fc2 = draw(2 * sum(layer.widths), H), draw(sum(layer.widths), H)
    leaves = [tensor.requires_grad_() for tensor in (x_RH, probs_R, fc1, fc2)]

    def run():
        compute(x_RH, probs_R, list(layer.rows), fc1, fc2, layer.widths).backward(dy_RH)
        for leaf in leaves:
            leaf.grad = None

    return run
