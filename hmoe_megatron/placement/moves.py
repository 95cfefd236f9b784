"""From one plan to another: which ranges of which experts change their rank, and how many bytes that is.

The experts of a layer, end to end, are a line of width units. A plan cuts that line into pieces; two plans cut it into
segments that one rank holds in each.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from hmoe_megatron.placement.cost import CostModel, expert_params
from hmoe_megatron.placement.plan import LayerPlan, Piece, PlacementPlan
from hmoe_megatron.widths import ranges_text


@dataclass(frozen=True, order=True)
class Move:
    """[lo, hi) of an expert's width goes from rank `source` to rank `to`, both of the pipeline stage of its layer.

    layer: the decoder's number.
    """

    layer: int
    expert: int
    lo: int
    hi: int
    source: int
    to: int

    @property
    def width(self) -> int:
        return self.hi - self.lo


def diff(old: PlacementPlan, new: PlacementPlan) -> list[Move]:
    """Every range that changes its rank, once, sorted and as long as one source and one target have it.

    The numbers of ranks may differ: a source can be a rank the new plan has not, a target one the old plan had not.
    Raises ValueError that says how the plans differ if their layers, widths or pipeline stages do.
    """
    check_same_experts(old.layers, new.layers, new.numbers)
    if old.stages != new.stages:
        raise ValueError(
            f"plans to compare: pipeline stages {old.stages!s:.120} of the layers in the old plan, "
            f"{new.stages!s:.120} in the new; make the plan again for the stages of the old one"
        )
    moves = []
    for number, before, after in zip(new.numbers, old.layers, new.layers, strict=True):
        if before.pieces != after.pieces:
            moves += (Move(number, *row) for row in _changes(before, after).tolist())
    return moves


def _changes(old: LayerPlan, new: LayerPlan) -> np.ndarray:
    """[n, 5] expert, lo, hi, source, to of each segment that changes its rank, in the order of the line."""
    offset_E = np.cumsum((0, *new.widths))
    starts, owners = zip(*map(_line, (old.pieces, new.pieces), (offset_E, offset_E)), strict=True)
    lo = np.union1d(*starts)
    hi = np.append(lo[1:], offset_E[-1])
    source, to = (
        owner[np.searchsorted(start, lo, side="right") - 1] for start, owner in zip(starts, owners, strict=True)
    )
    expert = np.searchsorted(offset_E, lo, side="right") - 1
    changes = np.stack([expert, lo - offset_E[expert], hi - offset_E[expert], source, to], axis=1)
    return changes[source != to]


def _line(pieces: Sequence[Sequence[Piece]], offset_E: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where each piece begins on the line, rising, and the rank that holds it."""
    expert, lo, _, rank = columns(pieces)
    return offset_E[expert] + lo, rank


def columns(pieces: Sequence[Sequence[Piece]]) -> np.ndarray:
    """[4, n] expert, lo, hi, rank of every piece, by expert and range."""
    rows = sorted((p.expert, p.lo, p.hi, rank) for rank, held in enumerate(pieces) for p in held)
    return np.array(rows, dtype=np.int64).T


def check_same_experts(old: Sequence[LayerPlan], new: Sequence[LayerPlan], numbers: Sequence[int]) -> None:
    """ValueError that says how they differ unless both have as many layers, of the same widths."""
    remedy = "give two plans of one model"
    if len(old) != len(new):
        raise ValueError(f"plans to compare: {len(old)} MoE layers in the old plan, {len(new)} in the new; {remedy}")
    differ = [n for n, (before, after) in enumerate(zip(old, new, strict=True)) if before.widths != after.widths]
    if differ:
        first = differ[0]
        raise ValueError(
            f"plans to compare: other widths (--hmoe-widths) in layers "
            f"{ranges_text([numbers[n] for n in differ])}: in layer {numbers[first]} the old plan has "
            f"{old[first].widths!s:.120}, the new {new[first].widths!s:.120}; {remedy}"
        )


def moved_bytes(moves: Iterable[Move], cost: CostModel) -> float:
    """State bytes that one copy of the experts sends for all moves, activations and gradients left out.

    A parameter: the weight, and over the copies two fp32 Adam moments and in bf16 an fp32 master weight. Experts move
    between steps, when gradients are zero.
    """
    return expert_params(sum(move.width for move in moves), cost.hidden_size) * cost.state_bytes
