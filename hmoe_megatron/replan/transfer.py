"""The numbers of one weight, or of what has its shape, from the ranks that hold them to those that will.

Legend: E experts of the layer, H hidden size, w width of a piece. Ranks are those of the expert-parallel and
expert-tensor-parallel group, whose pieces tile the layer's experts.
"""

from collections.abc import Iterator, Sequence
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


def parts_of(matrix: str, tensor: torch.Tensor, pieces: Sequence[Piece]) -> list[tuple[Piece, torch.Tensor]]:
    """Each piece's view in a tensor of the weight ``matrix``, width w second from the end in fc1 and last in fc2:
    [2, w, H] or [H, w]."""
    parts = MATRICES[matrix](tensor, [piece.width for piece in pieces])
    if matrix == "linear_fc1_weight":
        parts = [part.view(2, piece.width, -1) for piece, part in zip(pieces, parts, strict=True)]
    return list(zip(pieces, parts, strict=True))


def range_of(parts: Sequence[tuple[Piece, torch.Tensor]], way: Segment) -> torch.Tensor:
    """The view of a segment in the tensor of `parts_of`: [2, hi - lo, H] or [H, hi - lo]."""
    for piece, part in parts:
        if piece.expert == way.expert and piece.lo <= way.lo and way.hi <= piece.hi:
            return part[:, way.lo - piece.lo : way.hi - piece.lo]
    raise ValueError(f"expert {way.expert} [{way.lo}:{way.hi}) is not in {[str(piece) for piece, _ in parts]}")


def exchange(matrix: str, before: Sequence, after: Sequence, old, new, ways: Sequence[Segment], group) -> int:
    """Fill each tensor of ``after``, laid out by ``new``, from every rank's tensor of ``before``, laid out by ``old``;
    the bytes this rank sent. old, new: pieces of each rank; ways: of `segments`. Collective over ``group``."""
    rank, size = group.rank(), group.size()
    out = [[way for way in ways if way.source == rank != way.to == other] for other in range(size)]
    back = [[way for way in ways if way.to == rank != way.source == other] for other in range(size)]
    stay = [way for way in ways if way.source == way.to == rank]
    here = [parts_of(matrix, tensor, old[rank]) for tensor in before]
    there = [parts_of(matrix, tensor, new[rank]) for tensor in after]
    for source, to in zip(here, there, strict=True):
        for way in stay:
            range_of(to, way).copy_(range_of(source, way))
    per_unit = before[0].shape[1] * (2 if matrix == "linear_fc1_weight" else 1) * len(before)
    numbers = [[sum(way.hi - way.lo for way in of) * per_unit for of in ways] for ways in (back, out)]
    received, sent = (before[0].new_empty(sum(of)) for of in numbers)
    for view, packed in _beside([range_of(source, way) for of in out for source in here for way in of], sent):
        packed.copy_(view)
    torch.distributed.all_to_all_single(received, sent, *numbers, group=group)
    for view, packed in _beside([range_of(to, way) for of in back for to in there for way in of], received):
        view.copy_(packed)
    return sent.nbytes


def _beside(views: list[torch.Tensor], flat: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """(view, its place in ``flat``, of its shape), one behind the other."""
    places = flat.split([view.numel() for view in views]) if views else ()
    return ((view, place.view(view.shape)) for view, place in zip(views, places, strict=True))


def digest(matrix: str, tensors: Sequence, pieces: Sequence[Piece], widths_E: Sequence[int]) -> torch.Tensor:
    """[K, E] int64, of each of K tensors: over the bits of each expert's numbers here, times a hash of where in the
    expert they are, modulo 2^64. The sum over the ranks that hold a layer is the same under any plan, and with one bit
    or place wrong another."""
    device, hidden = tensors[0].device, tensors[0].shape[1]
    found = torch.zeros(len(tensors), len(widths_E), dtype=torch.int64, device=device)
    bits = torch.int32 if tensors[0].element_size() == 4 else torch.int16
    hash_H = _hash(torch.arange(-hidden, 0, device=device))
    for same in zip(*(parts_of(matrix, tensor, pieces) for tensor in tensors), strict=True):
        parts = [part if matrix == "linear_fc1_weight" else part.t()[None] for _, part in same]
        piece, other = same[0][0], torch.arange(len(parts[0]), device=device)
        unit = torch.arange(piece.lo, piece.hi, device=device)
        hashed = _hash(other[:, None] * widths_E[piece.expert] + unit)
        # H first, which no piece cuts: a hash of every place would be most of a change's time.
        rows = torch.stack([(part.view(bits) * hash_H).sum(-1) for part in parts])
        found[:, piece.expert] += (rows * hashed).sum((1, 2))
    return found


def _hash(place: torch.Tensor) -> torch.Tensor:
    """Odd, so that a product with it keeps every bit; not in proportion to the place."""
    spread = (place + 1) * _HASH
    return (spread ^ (spread >> 32)) | 1
