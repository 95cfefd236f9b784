"""The expert-parallel ranks a plan is made for: where they are, how fast, and how much they hold."""

import math
import numbers
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

MAX_RANKS = 65_536


@dataclass(frozen=True)
class Rank:
    """One rank. node: any number, equal on ranks that share a machine; speed: relative to the cost's profile.

    bytes: what the rank has for experts, over all layers of its pipeline stage (weights, gradients, optimizer
    state, activations); None for no cap.
    """

    node: int = 0
    speed: float = 1.0
    bytes: int | None = None

    def __post_init__(self):
        checks = {
            "node": _is_whole(self.node) and abs(self.node) <= MAX_RANKS,
            "speed": _is_number(self.speed) and 1e-3 <= self.speed <= 1e3,
            "bytes": self.bytes is None or (_is_whole(self.bytes) and 0 <= self.bytes <= 1 << 60),
        }
        if wrong := [name for name, right in checks.items() if not right]:
            raise ValueError(
                f"rank {self}: {', '.join(wrong)} out of range (node: a whole number; speed: 0.001 to "
                "1000; bytes: 0 or more, or None for no cap)"
            )


def as_ranks(ranks: int | Sequence[Rank]) -> tuple[Rank, ...]:
    """`ranks` equal ranks of one node, or the ranks themselves. ValueError for anything else."""
    if not _is_whole(ranks):
        if isinstance(ranks, Sequence) and ranks and all(isinstance(rank, Rank) for rank in ranks):
            if len(ranks) <= MAX_RANKS:
                return tuple(ranks)
            ranks = len(ranks)
    elif 1 <= ranks <= MAX_RANKS:
        return (Rank(),) * int(ranks)
    raise ValueError(
        f"ranks (--expert-model-parallel-size) {ranks!r:.80}: must be a whole number of at least 1 and at "
        f"most {MAX_RANKS}, or a Rank for each"
    )


def nodes_of(nodes: int, ranks_per_node: int, bytes: int | None = None) -> tuple[Rank, ...]:
    """Equal ranks, `ranks_per_node` on each of `nodes` machines, as torchrun numbers them."""
    return tuple(Rank(node, bytes=bytes) for node in range(nodes) for _ in range(ranks_per_node))


def kinds(ranks: Sequence[Rank], caps: bool = True) -> list[int]:
    """Kind of each rank, numbered by first appearance: ranks of one kind can change places in any plan.

    They have the same speed, as many neighbours on their node and, unless `caps` is False, the same cap. Rows come to a
    rank from all ranks alike, so which node it is makes no difference.
    """
    if all(rank is ranks[0] for rank in ranks):  # the usual case, of a number of ranks
        return [0] * len(ranks)
    size = Counter(rank.node for rank in ranks)
    found: dict = {}
    return [found.setdefault((rank.speed, size[rank.node], caps and rank.bytes), len(found)) for rank in ranks]


def _is_whole(value) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def _is_number(value) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value)
