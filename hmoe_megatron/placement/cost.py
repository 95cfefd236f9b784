"""What a piece costs its rank in time and bytes.

Both are affine in the piece's width, which is what makes the planner fast and its bounds sharp. A piece of width w
that gets m rows takes, on rank r,

    time_r(m, w) = (per_piece(m) + per_width(m) * padded(w)) / speed_r + m * travel_r
    bytes(m, w)  =  piece_bytes(m) + width_bytes(m) * w

with padded(w) the next multiple of the width tile; a piece without rows takes no time. So a cut saves no work: it
adds a per_piece, and its rows travel to two ranks. With H the hidden size and b the bytes of an element,

    per_piece(m) = launch + 4 m H b / activation rate
    per_width(m) = forward(m) + backward to the rows(m) + backward to the weights(m) + 8 m b / activation rate
    each of the three: max(6 (m + half a row tile) H / FLOP rate, bytes of weights or gradient / memory rate)
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np

from hmoe_megatron.placement.profiles import FLOPS, Profile
from hmoe_megatron.placement.ranks import Rank
from hmoe_megatron.untrusted import checked_fields, names_of, plain, range_problems

FORWARD_AND_BACKWARD = 3  # backward has two products for each one of the forward
MAIN_GRAD_BYTES = 8  # the gradient of a weight is added to one in fp32: read and written
SWIGLU_ELEMENTS = 8  # of a row's width: gate and up read, product written; its gradient, gate, up read, two written
JOINED_ROWS = 4  # rows of all pieces are joined, forward and backward: read and written
_RANGES = {"hidden_size": (1, 1 << 24), "expert_data_parallel_size": (1, 1 << 24), "live_micro_batches": (0.0, 1e6)}


def forward_flops(tokens: float, width: int, hidden_size: int) -> float:
    """6 m F H: a SwiGLU expert has three products of m x H x F, each a multiplication and an addition."""
    return 6.0 * tokens * width * hidden_size


def training_flops(tokens: float, width: int, hidden_size: int) -> float:
    """Forward and backward."""
    return FORWARD_AND_BACKWARD * forward_flops(tokens, width, hidden_size)


def expert_params(width: int, hidden_size: int) -> int:
    """3 F H: gate, up and down."""
    return 3 * width * hidden_size


@dataclass(frozen=True)
class CostModel:
    """Time and bytes of pieces on the hardware of `profile`; FLOPs where nothing is known of it.

    Tokens are rows that an expert gets from one micro-batch of the whole expert-parallel group.
    expert_data_parallel_size: copies of each expert, over which the distributed optimizer's state is divided;
    live_micro_batches: micro-batches whose activations are held at once (pipeline stages; 0 with full recompute).
    """

    profile: Profile = FLOPS
    hidden_size: int = 1
    expert_data_parallel_size: int = 1
    live_micro_batches: float = 1.0

    def __post_init__(self):
        problems = range_problems(self, _RANGES)
        if not isinstance(self.profile, Profile):
            problems.append("profile is not a Profile")
        if problems:
            raise ValueError("cost: " + "; ".join(problems))

    def to_dict(self) -> dict:
        """As JSON has it, the profile with it."""
        return plain(self) | {"profile": self.profile.to_dict()}

    @classmethod
    def from_dict(cls, value) -> "CostModel":
        """The model of parsed JSON by `to_dict`. Raises ValueError that lists every problem found."""
        values = checked_fields("cost", names_of(cls), value)
        return cls(**values | {"profile": Profile.from_dict(values["profile"])})

    @property
    def unit(self) -> str:
        """Of predicted time: "s", or "FLOPs" with the FLOPs-only profile."""
        return self.profile.unit

    @property
    def width_tile(self) -> int:
        return self.profile.width_tile

    def compute(self, tokens_E) -> tuple[np.ndarray, np.ndarray]:
        """(per_piece [E], per_width [E]) at speed 1, neither falling as tokens rise; both 0 without tokens."""
        m, profile = np.asarray(tokens_E, dtype=float), self.profile
        element_bytes = profile.element_bytes
        # An expected load ends anywhere in a tile of rows: half a tile is lost on average.
        products = forward_flops(m + (profile.row_tile - 1) / 2, 1, self.hidden_size) / profile.flops_per_s
        per_piece, per_width = profile.launch_s, FORWARD_AND_BACKWARD * products
        if profile.memory_bytes_per_s:
            param_s = expert_params(1, self.hidden_size) / profile.memory_bytes_per_s
            per_width = sum(
                np.maximum(products, moved * param_s) for moved in (element_bytes, element_bytes, MAIN_GRAD_BYTES)
            )
        if profile.activation_bytes_per_s:
            element_s = m * element_bytes / profile.activation_bytes_per_s
            per_piece = per_piece + JOINED_ROWS * self.hidden_size * element_s
            per_width = per_width + SWIGLU_ELEMENTS * element_s
        return np.where(m > 0, per_piece, 0.0), np.where(m > 0, per_width, 0.0)

    def travel(self, ranks: Sequence[Rank]) -> np.ndarray:
        """[R] time of one row to a rank and back, forward and backward, by link.

        Rows come from all ranks alike: of R ranks, one is the rank itself, the others of its node are a link inside
        the node away, the rest a link across; where only the rate inside is known, that is the rate across too.
        """
        profile = self.profile
        if not (profile.intra_node_bytes_per_s or profile.inter_node_bytes_per_s):
            return np.zeros(len(ranks))
        size = Counter(rank.node for rank in ranks)
        row_bytes = 2 * 2 * self.hidden_size * profile.element_bytes  # dispatch and combine, twice
        inside, across = (
            row_bytes / rate if rate else 0.0
            for rate in (
                profile.intra_node_bytes_per_s,
                profile.inter_node_bytes_per_s or profile.intra_node_bytes_per_s,
            )
        )
        return np.array(
            [((size[rank.node] - 1) * inside + (len(ranks) - size[rank.node]) * across) / len(ranks) for rank in ranks]
        )

    @property
    def state_bytes(self) -> float:
        """Of a parameter on each copy, the gradient left out: what a move of it takes along."""
        element_bytes = self.profile.element_bytes
        return element_bytes + (8 if element_bytes == 4 else 12) / self.expert_data_parallel_size

    def memory(self, tokens_E) -> tuple[np.ndarray, np.ndarray]:
        """(piece_bytes [E], width_bytes [E]) with the distributed optimizer.

        A parameter: weight, fp32 gradient, and over the copies two fp32 Adam moments and, unless the weight is one, an
        fp32 master weight: 6 + 12 / copies in bf16, 8 + 8 / copies in fp32, as Megatron-Core's page on the
        distributed optimizer has it. A row: input and output [H], gate, up and their product [w]. Whole numbers:
        their sums are exact.
        """
        m = np.asarray(tokens_E, dtype=float) * self.live_micro_batches * self.profile.element_bytes
        param_bytes = self.state_bytes + 4
        return np.ceil(2 * m * self.hidden_size), np.ceil(3 * m + expert_params(1, self.hidden_size) * param_bytes)


@dataclass(frozen=True)
class Prediction:
    """What a plan costs each rank under the loads it was made for; one number a rank in each tuple.

    time: in the cost's unit (seconds; FLOPs without a hardware profile); tokens: rows computed, a cut expert's on
    each of its ranks; flops: of training; params: weights held; bytes: of weights, gradients, optimizer state and
    activations. bound: no plan for these ranks, with cuts where they were allowed, has a slowest rank below it.
    """

    time: tuple[float, ...]
    tokens: tuple[float, ...]
    flops: tuple[float, ...]
    params: tuple[int, ...]
    bytes: tuple[int, ...]
    bound: float

    @property
    def over_mean(self) -> float:
        """Slowest rank over the mean; 1 where no rank has anything to do."""
        return max(self.time) * len(self.time) / total if (total := sum(self.time)) else 1.0

    @property
    def gap(self) -> float:
        """Slowest rank over the bound, minus 1."""
        return max(max(self.time) / self.bound - 1, 0.0) if self.bound else 0.0


def piece_times(pieces, tokens_E, cost: CostModel, ranks: Sequence[Rank]) -> list[list[float]]:
    """Time of each of pieces[r] on its rank."""
    of = _Columns(pieces)
    times = iter(of.times(np.asarray(tokens_E, dtype=float), cost, ranks).tolist())
    return [[next(times) for _ in held] for held in pieces]


def predict(pieces, tokens_E, cost: CostModel, ranks: Sequence[Rank], bound: float) -> Prediction:
    """What pieces[r] cost each rank under the loads tokens_E."""
    of, tokens = _Columns(pieces), np.asarray(tokens_E, dtype=float)
    piece_bytes, width_bytes = cost.memory(tokens)
    return Prediction(
        time=of.by_rank(of.times(tokens, cost, ranks)),
        tokens=of.by_rank(tokens[of.expert]),
        flops=of.by_rank(training_flops(tokens[of.expert], of.width, cost.hidden_size)),
        params=tuple(map(int, of.by_rank(expert_params(of.width, cost.hidden_size)))),
        bytes=tuple(map(int, of.by_rank(piece_bytes[of.expert] + width_bytes[of.expert] * of.width))),
        bound=bound,
    )


class _Columns:
    """rank, expert and width of all pieces, one array each."""

    def __init__(self, pieces):
        self.ranks = len(pieces)
        self.rank = np.repeat(np.arange(len(pieces)), list(map(len, pieces)))
        numbers = chain.from_iterable(chain.from_iterable(pieces))  # a piece is a tuple: 5 times as fast as by name
        self.expert, lo, hi = np.fromiter(numbers, int).reshape(-1, 3).T
        self.width = hi - lo

    def times(self, tokens_E: np.ndarray, cost: CostModel, ranks: Sequence[Rank]) -> np.ndarray:
        per_piece, per_width = (values[self.expert] for values in cost.compute(tokens_E))
        padded = -(-self.width // cost.width_tile) * cost.width_tile
        speed = np.array([rank.speed for rank in ranks])[self.rank]
        return (per_piece + per_width * padded) / speed + tokens_E[self.expert] * cost.travel(ranks)[self.rank]

    def by_rank(self, amounts: np.ndarray) -> tuple[float, ...]:
        return tuple(np.bincount(self.rank, amounts, self.ranks).tolist())
