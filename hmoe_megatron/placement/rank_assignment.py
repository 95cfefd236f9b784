"""Which rank gets which share of a layer. Ranks of one kind change places without changing any time (`ranks.kinds`).

Two uses: bytes that add up evenly over the layers of a pipeline stage, and a new plan near an old one.
Letters: L layers of one stage, E experts, R ranks. row_R[r] is the rank of the given layer whose pieces rank r gets.
"""

from collections import defaultdict
from collections.abc import Sequence
from copy import copy
from dataclasses import replace

import numpy as np
from scipy.optimize import linear_sum_assignment

from hmoe_megatron.placement.moves import check_same_experts, columns
from hmoe_megatron.placement.plan import LayerPlan, Piece
from hmoe_megatron.placement.ranks import Rank, kinds

ROUNDS = 20  # over all layers of a stage; the first three bring most
LEAST_GAIN = 0.001  # of the fullest rank's bytes, or of a layer's width in place: less is not worth another order

Pieces = tuple[tuple[Piece, ...], ...]


def even_bytes(layers: Sequence[LayerPlan], ranks: Sequence[Rank], stages: Sequence[int] = ()) -> tuple[LayerPlan, ...]:
    """The layers with ranks renamed so that the fullest rank of each kind and stage holds few bytes over all layers.

    stages: pipeline stage of each layer (none given: one). Never more bytes on the fullest rank of a kind than before.
    Renamed only where that rank loses LEAST_GAIN, or was over its cap; ranks of equal bytes keep their numbers.
    """
    made = list(layers)
    for members in _stages(stages, len(layers)):
        bytes_LR = _bytes([layers[n] for n in members])
        row_LR = np.tile(np.arange(len(ranks)), (len(members), 1))
        for kind_R in _by_kind(ranks):
            row_LR[:, kind_R] = kind_R[_even_rows(bytes_LR[:, kind_R], _caps(ranks)[kind_R[0]])]
        for n, row_R in zip(members, row_LR, strict=True):
            made[n] = _renamed(layers[n], row_R)
    return tuple(made)


def _even_rows(bytes_LR: np.ndarray, cap: float) -> np.ndarray:
    """row_LR: layer by layer, widest spread first, its fullest share to the rank with least of the other layers.

    That order has the smallest maximum of all orders of one layer, so rounds never raise it.
    """
    identity = np.arange(bytes_LR.shape[1])
    row_LR = np.tile(identity, (len(bytes_LR), 1))
    largest_first = np.argsort(-bytes_LR, axis=1, kind="stable")
    widest_first = np.argsort(-np.ptp(bytes_LR, axis=1), kind="stable")
    placed_LR, sums_R, fullest = np.zeros_like(bytes_LR), np.zeros(identity.size), np.inf
    for _ in range(ROUNDS):
        for n in widest_first:
            others_R = sums_R - placed_LR[n]
            row_LR[n, np.argsort(others_R, kind="stable")] = largest_first[n]
            placed_LR[n] = bytes_LR[n, row_LR[n]]
            sums_R = others_R + placed_LR[n]
        if sums_R.max() >= fullest:
            break
        fullest = sums_R.max()
    before = bytes_LR.sum(axis=0).max()
    if before - fullest <= (LEAST_GAIN * before if before <= cap else 0):
        return np.tile(identity, (len(bytes_LR), 1))
    row_LR = row_LR[:, np.argsort(row_LR[widest_first[0]])]  # all alike renamed: the widest layer stays as it is
    return np.array([_fewest_renamed(row_R, bytes_R) for row_R, bytes_R in zip(row_LR, bytes_LR, strict=True)])


def _fewest_renamed(row_R: np.ndarray, bytes_R: np.ndarray) -> np.ndarray:
    """The same bytes on each rank as by row_R, with as many ranks as can be keeping what they have."""
    want_R, row_R = bytes_R[row_R], np.arange(row_R.size)
    rest = np.flatnonzero(want_R != bytes_R)
    row_R[rest[np.argsort(want_R[rest], kind="stable")]] = rest[np.argsort(bytes_R[rest], kind="stable")]
    return row_R


def relabel(
    layers: Sequence[LayerPlan],
    old: Sequence[LayerPlan],
    ranks: Sequence[Rank],
    stages: Sequence[int] = (),
    cut_multiple: int = 1,
    numbers: Sequence[int] = (),
) -> tuple[LayerPlan, ...]:
    """The layers with ranks renamed, and ranges of cut experts laid out again, so that few width units change rank.

    Every width unit is 3 H parameters with their optimizer state, so fewest units are fewest bytes. Never more move
    than before, and with whole experts the fewest of all ways to rename (an assignment problem in each layer); where
    both plans cut an expert, renaming and layout take turns. Widths of pieces stay, cuts stay at multiples of
    cut_multiple. If no rank is over its cap before, none is after: where the fewest moves would break a cap, some
    layers of the stage move more.
    Fewer ranks than in the old plan: what the ranks beyond held moves anyway. More: those beyond held nothing.
    Raises ValueError, which names layers by `numbers`, if old has other layers or widths, or a cut is at no multiple.
    """
    numbers = tuple(numbers) or range(len(layers))
    check_same_experts(old, layers, numbers)
    made, groups, cap_R = list(layers), _by_kind(ranks), _caps(ranks)
    for members in _stages(stages, len(layers)):
        bytes_LR = _bytes([layers[n] for n in members])
        limit_R = np.maximum(cap_R, bytes_LR.sum(axis=0))
        given = [_Nearest(numbers[n], layers[n], old[n], groups, cut_multiple) for n in members]
        nearest = [copy(layer) for layer in given]
        for layer in nearest:
            layer.approach()
        if (_sums(nearest, bytes_LR) > limit_R).any():
            nearest = _within_limits(nearest, given, bytes_LR, limit_R)
        for n, layer in zip(members, nearest, strict=True):
            made[n] = _renamed(layers[n], layer.row_R, layer.pieces(layers[n].pieces))
    return tuple(made)


def _within_limits(
    free: Sequence["_Nearest"], given: Sequence["_Nearest"], bytes_LR: np.ndarray, limit_R: np.ndarray
) -> Sequence["_Nearest"]:
    """`free`, the nearest without caps, with some layers less near so that all fit; else `given`, nearer."""
    in_place = _in_place(given)
    for layers in (free, given):
        for layer, bytes_R in zip(layers, bytes_LR, strict=True):
            sums_R = _sums(layers, bytes_LR)
            if layers is given or (sums_R > limit_R).any():
                layer.approach(bytes_R, limit_R - sums_R + bytes_R[layer.row_R])  # in the room that the others leave
        if (_sums(layers, bytes_LR) <= limit_R).all() and _in_place(layers) >= in_place:
            return layers
    raise AssertionError("names that fit were given, and no approach leaves them")


class _Nearest:
    """A layer on its way to the old plan: row_R so far, and [4, P] expert, lo, hi, rank of its pieces by range."""

    def __init__(self, number: int, layer: LayerPlan, old: LayerPlan, groups: Sequence[np.ndarray], multiple: int):
        self.groups, self.multiple, self.cut = groups, multiple, layer.cuts > 0
        self.row_R, self.now, self.old = np.arange(layer.ranks), columns(layer.pieces), columns(old.pieces)
        self.old = self.old[:, self.old[3] < layer.ranks]
        if (wrong := self.now[1] % multiple > 0).any():
            expert, lo = self.now[:2, wrong][:, 0]
            raise ValueError(
                f"cut_multiple (--hmoe-cut-multiple) {multiple}: expert {expert} of layer {number} is cut "
                f"at {lo}; give the multiple that the plan was made with"
            )

    def approach(self, bytes_R: np.ndarray | None = None, room_R: np.ndarray | None = None) -> None:
        """Rename and lay out, in turns, while that leaves more in place.

        bytes_R: of the given layer's ranks; room_R: for it on each rank. With these, fewest ranks over their room come
        before what is left in place, so that a layer that fits goes on to fit.
        """
        total = 1 + (self.now[2] - self.now[1]).sum()  # one rank over its room is worse than nothing in place

        def worth(anywhere=False):
            overlap_RR = self.overlap(anywhere)
            if room_R is None:
                return overlap_RR
            over_RR = bytes_R[self.row_R][:, None] - room_R
            return overlap_RR - np.where(over_RR > 0, total * (1 + over_RR / (1 + bytes_R.max())), 0)

        kept, most, least_gain, worth_RR = worth().trace(), total - 1, 0, worth(anywhere=True)
        while most - kept > least_gain:
            before, row_R = (self.row_R, self.now), self.assigned(worth_RR)
            most = min(most, worth_RR[row_R, np.arange(row_R.size)].sum())
            self.rename(row_R)
            if self.cut:
                self.now = _laid_out(self.now, self.old, self.multiple)
            worth_RR = worth()
            if worth_RR.trace() <= kept:
                self.row_R, self.now = before
                return
            kept, least_gain = worth_RR.trace(), LEAST_GAIN * total

    def assigned(self, worth_RR: np.ndarray) -> np.ndarray:
        """row_R within kinds of ranks, of the most worth in all."""
        row_R = np.empty(len(worth_RR), dtype=np.int64)
        for kind_R in self.groups:
            of_kind = worth_RR if kind_R.size == row_R.size else worth_RR[np.ix_(kind_R, kind_R)]
            rows, labels = linear_sum_assignment(of_kind, maximize=True)
            row_R[kind_R[labels]] = kind_R[rows]
        return row_R

    def rename(self, row_R: np.ndarray) -> None:
        expert, lo, hi, rank = self.now
        self.row_R, self.now = self.row_R[row_R], np.stack([expert, lo, hi, np.argsort(row_R)[rank]])

    def overlap(self, anywhere: bool = False) -> np.ndarray:
        """[a, b] width units that rank a has now and rank b had; anywhere: if each could lie where it likes."""
        ranks, (expert, lo, hi, rank), (old_expert, old_lo, old_hi, old_rank) = self.row_R.size, self.now, self.old
        p, q = _pairs(expert, old_expert)
        if anywhere:
            common = np.minimum((hi - lo)[p], (old_hi - old_lo)[q])
        else:
            common = _common(lo[p], hi[p], old_lo[q], old_hi[q])
        return np.bincount(rank[p] * ranks + old_rank[q], common, ranks * ranks).reshape(ranks, ranks)

    def pieces(self, given: Pieces) -> Pieces:
        lo = {(expert, rank): lo for expert, lo, _, rank in self.now.T.tolist()}
        return tuple(
            tuple(p if p.lo == (at := lo[p.expert, rank]) else Piece(p.expert, at, at + p.width) for p in given[row])
            for rank, row in enumerate(self.row_R.tolist())
        )


def _laid_out(now: np.ndarray, old: np.ndarray, multiple: int) -> np.ndarray:
    """The pieces of each expert by where their rank's old piece began, or they begin now without one; then neighbours
    change places while that leaves more where it was. The piece whose width is no multiple stays last."""
    expert, lo, hi, rank = now
    p, q = _pairs(expert, old[0])
    same = rank[p] == old[3][q]
    was_lo, was_hi = was = np.zeros((2, rank.size), dtype=np.int64)
    was[:, p[same]] = old[1:3, q[same]]
    order = np.lexsort((np.where(was_hi > 0, was_lo, lo), (hi - lo) % multiple > 0, expert))
    rank, width, was_lo, was_hi = items = np.stack([rank, hi - lo, was_lo, was_hi])[:, order]
    base = (np.cumsum(width) - width)[np.searchsorted(expert, expert)]  # of all experts end to end
    neighbours, turn, idle = np.flatnonzero(expert[1:] == expert[:-1]), 0, 0
    while idle < 2:
        a = neighbours[neighbours % 2 == turn]
        a = a[width[a + 1] % multiple == 0]
        b, lo = a + 1, (np.cumsum(width) - width - base)[a]
        hi = lo + width[a] + width[b]
        now_AB = _common(lo, lo + width[a], was_lo[a], was_hi[a]) + _common(lo + width[a], hi, was_lo[b], was_hi[b])
        then_BA = _common(lo, lo + width[b], was_lo[b], was_hi[b]) + _common(lo + width[b], hi, was_lo[a], was_hi[a])
        a = a[then_BA > now_AB]
        items[:, a], items[:, a + 1] = items[:, a + 1], items[:, a]
        turn, idle = 1 - turn, 0 if a.size else idle + 1
    lo = np.cumsum(width) - width - base
    return np.stack([expert, lo, lo + width, rank])


def _pairs(expert: np.ndarray, old_expert: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Indices (new, old) of every pair of pieces of one expert; both arguments rise."""
    first, end = (np.searchsorted(old_expert, expert, side=side) for side in ("left", "right"))
    pairs = end - first
    new = np.repeat(np.arange(expert.size), pairs)
    return new, np.arange(new.size) + np.repeat(first - np.cumsum(pairs) + pairs, pairs)


def _common(lo, hi, old_lo, old_hi):
    return np.maximum(np.minimum(hi, old_hi) - np.maximum(lo, old_lo), 0)


def _renamed(layer: LayerPlan, row_R: np.ndarray, pieces: Pieces | None = None) -> LayerPlan:
    """The layer with rank r as rank row_R[r] was; pieces: with these, of the same widths."""
    rows = row_R.tolist()
    pieces = tuple(layer.pieces[row] for row in rows) if pieces is None else pieces
    if pieces == layer.pieces and rows == list(range(len(rows))):
        return layer
    by_rank = {
        name: tuple(value[row] for row in rows)
        for name, value in vars(layer.predicted).items()
        if isinstance(value, tuple)
    }
    return replace(layer, pieces=pieces, predicted=replace(layer.predicted, **by_rank))


def _stages(stages: Sequence[int], layers: int) -> list[list[int]]:
    """Numbers of the layers of each pipeline stage."""
    members = defaultdict(list)
    for n, stage in enumerate(tuple(stages) or (0,) * layers):
        members[stage].append(n)
    return list(members.values())


def _by_kind(ranks: Sequence[Rank]) -> list[np.ndarray]:
    kind_R = np.array(kinds(ranks))
    return [np.flatnonzero(kind_R == kind) for kind in range(kind_R.max() + 1)]


def _caps(ranks: Sequence[Rank]) -> np.ndarray:
    return np.array([np.inf if rank.bytes is None else rank.bytes for rank in ranks], dtype=float)


def _bytes(layers: Sequence[LayerPlan]) -> np.ndarray:
    """[L, R], whole numbers: their sums are exact in any order below 2**53."""
    return np.array([layer.predicted.bytes for layer in layers], dtype=float)


def _in_place(nearest: Sequence[_Nearest]) -> float:
    return sum(layer.overlap().trace() for layer in nearest)


def _sums(nearest: Sequence[_Nearest], bytes_LR: np.ndarray) -> np.ndarray:
    return sum(bytes_R[layer.row_R] for layer, bytes_R in zip(nearest, bytes_LR, strict=True))
