"""The numbers of one weight, or of what has its shape, from the ranks that hold them to those that will.

Legend: E experts of the layer, H hidden size, w width of a piece. Ranks are those of the expert-parallel and
expert-tensor-parallel group, whose pieces tile the layer's experts.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from hmoe_megatron.moe.compute.flat import MATRICES
from hmoe_megatron.placement.plan import Piece

_HASH = -7046029254386353131  # 2^64 / golden ratio, odd, as int64: spreads positions over all bits


class Segment(NamedTuple):
    """[lo, hi) of an expert, which rank ``source`` holds before and rank ``to`` after; they may be one."""

    expert: int
    lo: int
    hi: int
    source: int
    to: int


def segments(old: Sequence[Sequence[Piece]], new: Sequence[Sequence[Piece]]) -> list[Segment]:
    """Every range as long as one rank holds it before and one after, each unit of width once, in order."""
    found = []
    before = sorted((piece, rank) for rank, pieces in enumerate(old) for piece in pieces)
    for to, pieces in enumerate(new):
        for piece in pieces:
            for held, source in before:
                lo, hi = max(piece.lo, held.lo), min(piece.hi, held.hi)
                if held.expert == piece.expert and lo < hi:
                    found.append(Segment(piece.expert, lo, hi, source, to))
    return sorted(found)


def range_of(matrix: str, tensor: torch.Tensor, pieces: Sequence[Piece], expert: int, lo: int, hi: int) -> torch.Tensor:
    """The view of [lo, hi) of an expert in a tensor of the weight ``matrix``: [2, hi - lo, H] or [H, hi - lo]."""
    parts = MATRICES[matrix](tensor, [piece.width for piece in pieces])
    for piece, part in zip(pieces, parts, strict=True):
        if piece.expert == expert and piece.lo <= lo and hi <= piece.hi:
            part = part.view(2, piece.width, -1) if matrix == "linear_fc1_weight" else part
            return part[:, lo - piece.lo : hi - piece.lo]
    raise ValueError(f"expert {expert} [{lo}:{hi}) is not in {[*map(str, pieces)]}")


def exchange(matrix: str, before: torch.Tensor, after: torch.Tensor, old, new, ways: Sequence[Segment], group) -> int:
    """Fill ``after``, laid out by ``new``, from every rank's ``before``, laid out by ``old``; the bytes this rank sent.
    old, new: pieces of each rank; ways: of `segments`. Collective over ``group``."""
    rank, size = group.rank(), group.size()
    for way in ways:
        if way.source == way.to == rank:
            span = way.expert, way.lo, way.hi
            range_of(matrix, after, new[rank], *span).copy_(range_of(matrix, before, old[rank], *span))
    out = [[way for way in ways if way.source == rank != way.to == other] for other in range(size)]
    back = [[way for way in ways if way.to == rank != way.source == other] for other in range(size)]
    packed = [range_of(matrix, before, old[rank], w.expert, w.lo, w.hi).reshape(-1) for ws in out for w in ws]
    sent = torch.cat(packed) if packed else before.new_empty(0)
    per_unit = before.shape[1] * (2 if matrix == "linear_fc1_weight" else 1)
    numbers = [[sum(way.hi - way.lo for way in ways) * per_unit for ways in of] for of in (back, out)]
    received = before.new_empty(sum(numbers[0]))
    torch.distributed.all_to_all_single(received, sent, *numbers, group=group)
    start = 0
    for way in (way for ways in back for way in ways):
        there = range_of(matrix, after, new[rank], way.expert, way.lo, way.hi)
        there.copy_(received[start : start + there.numel()].view(there.shape))
        start += there.numel()
    return sent.nbytes


def digest(matrix: str, tensor: torch.Tensor, pieces: Sequence[Piece], widths_E: Sequence[int]) -> torch.Tensor:
    """[E] int64: over the bits of each expert's numbers here, times a hash of where in the expert they are, modulo
    2^64. The sum over the ranks that hold a layer is the same under any plan, and with one bit or place wrong another.
    """
    found = torch.zeros(len(widths_E), dtype=torch.int64, device=tensor.device)
    bits = torch.int32 if tensor.element_size() == 4 else torch.int16
    for piece in pieces:
        part = range_of(matrix, tensor, pieces, *piece).contiguous()
        unit = torch.arange(piece.lo, piece.hi, device=tensor.device)
        other, across = (torch.arange(n, device=tensor.device) for n in (part.shape[0], part.shape[-1]))
        if matrix == "linear_fc1_weight":
            place = (other[:, None, None] * widths_E[piece.expert] + unit[:, None]) * len(across) + across
        else:
            place = other[:, None] * widths_E[piece.expert] + unit
        found[piece.expert] += (part.view(bits).long() * ((place + 1) * _HASH)).sum()
    return found
