"""What a piece costs its rank: FLOPs, and the seam for measured or published hardware profiles."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from hmoe_megatron.placement.plan import Piece, Prediction


class Cost(Protocol):
    """Cost of `tokens` rows through a piece of `width`, in the cost's own unit (FLOPs or seconds).

    0 for no tokens, finite, never falling with tokens or width, and
    cost(m, a + b) <= cost(m, a) + cost(m, b): a cut saves no work in total.
    """

    def __call__(self, tokens: float, width: int) -> float: ...


def forward_flops(tokens: float, width: int, hidden_size: int) -> float:
    """6 m F H: a SwiGLU expert has three products of m x H x F, each a multiplication and an addition."""
    return 6.0 * tokens * width * hidden_size


def training_flops(tokens: float, width: int, hidden_size: int) -> float:
    """Forward and backward; backward has two products for each one of the forward."""
    return 3.0 * forward_flops(tokens, width, hidden_size)


def expert_params(width: int, hidden_size: int) -> int:
    """3 F H: gate, up and down."""
    return 3 * width * hidden_size


@dataclass(frozen=True)
class FlopsCost:
    """Training FLOPs as cost: what is balanced where nothing is known of the hardware."""

    hidden_size: int = 1

    def __call__(self, tokens: float, width: int) -> float:
        return training_flops(tokens, width, self.hidden_size)


def predict(
    pieces: Sequence[Sequence[Piece]], tokens_E: Sequence[float], cost: Cost, hidden_size: int, bound: float
) -> Prediction:
    """Per-rank sums over pieces[r] under the loads tokens_E."""

    def per_rank(amount):
        return tuple(amount(held) for held in pieces)

    return Prediction(
        cost=per_rank(lambda held: math.fsum(cost(tokens_E[p.expert], p.width) for p in held)),
        tokens=per_rank(lambda held: math.fsum(tokens_E[p.expert] for p in held)),
        flops=per_rank(lambda held: math.fsum(
            training_flops(tokens_E[p.expert], p.width, hidden_size) for p in held)),
        params=per_rank(lambda held: sum(expert_params(p.width, hidden_size) for p in held)),
        bound=bound,
    )
