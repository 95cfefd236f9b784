"""Whole items on ranks: largest first, then rounds of moves and swaps between full ranks and empty ones.

An item is an expert, or the part of one that stays together. How full a rank is: its time over a target time, or its
bytes over its cap, whichever is more; the fullest rank is what the rounds lower.
Letters: I items, C kinds of ranks, R ranks, P pairs of ranks, K places on a rank.
"""

import heapq
from dataclasses import dataclass, replace
from random import Random

import numpy as np

ROUNDS = 64
CLOSE = 1e-4  # over the target: near enough
FEW_ITEMS, STARTS, SPREAD = 16, 64, 0.4
MIN_GAIN = 1e-9  # of the fuller of two ranks; less is rounding


@dataclass(frozen=True)
class Items:
    """time_CI: on each kind of rank; bytes_I; kind_R; cap_R: bytes, or None where no rank has a cap."""

    time_CI: np.ndarray
    bytes_I: np.ndarray
    kind_R: np.ndarray
    cap_R: np.ndarray | None

    @property
    def ranks(self) -> int:
        return len(self.kind_R)

    @property
    def enough(self) -> float:
        """How full the fullest rank may be left: a time may be a little over its target, bytes may not."""
        return 1 + CLOSE if self.cap_R is None else 1.0

    def slowest(self, owner_I: np.ndarray) -> float:
        """Time of the slowest rank."""
        times_I = self.time_CI[self.kind_R[owner_I], np.arange(owner_I.size)]
        return float(np.bincount(owner_I, times_I, self.ranks).max())


def largest_first(items: Items, target: float, most_a_rank: int | None = None) -> np.ndarray:
    """Rank [I] of each item: the largest first, each to the rank that is least full with it (Graham 1969).

    most_a_rank: places on each rank, for packings of equal counts. Equal ranks in their order, equal items too.
    """
    if items.cap_R is not None:
        return _largest_first_capped(items, target)
    kinds = items.time_CI.shape[0]
    heaps = [[(0.0, 0, rank) for rank in np.flatnonzero(items.kind_R == kind).tolist()] for kind in range(kinds)]
    times_CI = items.time_CI.tolist()
    owner_I = [0] * items.bytes_I.size
    largest = np.lexsort((-items.bytes_I, -items.time_CI.min(axis=0))).tolist()
    if kinds == 1:  # the usual case, without the choice between kinds
        heap, times = heaps[0], times_CI[0]
        for i in largest:
            load, held, rank = heap[0]
            owner_I[i] = rank
            if held + 1 == most_a_rank:
                heapq.heappop(heap)
            else:
                heapq.heapreplace(heap, (load + times[i], held + 1, rank))
        return np.array(owner_I)
    for i in largest:
        kind = min((k for k in range(kinds) if heaps[k]), key=lambda k: (heaps[k][0][0] + times_CI[k][i], k))
        load, held, rank = heapq.heappop(heaps[kind])
        owner_I[i] = rank
        if held + 1 != most_a_rank:
            heapq.heappush(heaps[kind], (load + times_CI[kind][i], held + 1, rank))
    return np.array(owner_I)


def _largest_first_capped(items: Items, target: float) -> np.ndarray:
    time_IR = items.time_CI.T[:, items.kind_R] / target
    share_IR = items.bytes_I[:, None] / items.cap_R
    owner_I = np.zeros(items.bytes_I.size, dtype=int)
    time_R, share_R = np.zeros(items.ranks), np.zeros(items.ranks)
    size_I = np.maximum(time_IR.min(axis=1), share_IR.min(axis=1))
    for i in np.argsort(-size_I, kind="stable").tolist():
        full_R = np.maximum(time_R + time_IR[i], share_R + share_IR[i])
        rank = int(full_R.argmin())
        owner_I[i] = rank
        time_R[rank] += time_IR[i, rank]
        share_R[rank] += share_IR[i, rank]
    return owner_I


def improve(items: Items, owner_I: np.ndarray, target: float, rounds: int = ROUNDS) -> np.ndarray:
    """`owner_I` after moves and swaps of two ranks' items, until no rank is over 1 or nothing helps the fullest."""
    if items.ranks == 1 or not owner_I.size:
        return owner_I
    table = _Table(items, owner_I, target)
    for _ in range(rounds):
        order = np.argsort(table.full_R, kind="stable")
        if table.full_R[order[-1]] <= items.enough:
            break
        half = items.ranks // 2
        full, empty = order[: -half - 1 : -1], order[:half]
        over = table.full_R[full] > 1
        if table.exchange(full[over], empty[over]):
            continue
        if not table.exchange(order[-1:], order[:-1]):
            break
    return table.owner_I()


def from_many_starts(items: Items, owner_I: np.ndarray, target: float, starts: int = STARTS) -> np.ndarray:
    """`owner_I` or better: largest first with items' sizes off by up to SPREAD, improved, for few items.

    Moves and swaps of two ranks end up to 8 % above the optimum where ranks hold two or three items each; of many
    starts one ends at it (tests/unit/placement/test_milp.py).
    """
    best, uniform = _fullest(items, owner_I, target), Random(0).random  # the same numbers on every machine
    for _ in range(starts if owner_I.size <= FEW_ITEMS else 0):
        if best <= items.enough:
            break
        factor_I = np.array([1 - SPREAD + 2 * SPREAD * uniform() for _ in range(owner_I.size)])
        order_of = replace(items, time_CI=items.time_CI * factor_I, bytes_I=items.bytes_I * factor_I)
        other_I = improve(items, largest_first(order_of, target), target)
        if (full := _fullest(items, other_I, target)) < best:
            best, owner_I = full, other_I
    return owner_I


def _fullest(items: Items, owner_I: np.ndarray, target: float) -> float:
    return float(_Table(items, owner_I, target).full_R.max())


class _Table:
    """item_RK: the items of each rank, then at least one empty place, which is item I: no time, no bytes."""

    def __init__(self, items: Items, owner_I: np.ndarray, target: float):
        self.kind_R, self.items = items.kind_R, items.bytes_I.size
        self.time_CI = np.zeros((len(items.time_CI), self.items + 1))
        self.time_CI[:, :-1] = items.time_CI / target
        self.bytes_I = None if items.cap_R is None else np.append(items.bytes_I, 0.0)
        self.cap_R = items.cap_R
        count_R = np.bincount(owner_I, minlength=items.ranks)
        self.item_RK = np.full((items.ranks, count_R.max() + 1), self.items)
        by_rank = np.argsort(owner_I, kind="stable")
        starts = np.cumsum(count_R) - count_R
        self.item_RK[owner_I[by_rank], np.arange(self.items) - starts[owner_I[by_rank]]] = by_rank
        self.full_R, self.load_R, self.held_R = np.zeros((3, items.ranks))
        self._sum(np.arange(items.ranks))

    def _sum(self, ranks: np.ndarray) -> None:
        """Sums anew rather than adding up differences: rounding never accumulates."""
        item_PK = self.item_RK[ranks]
        self.load_R[ranks] = self.full_R[ranks] = self.time_CI[self.kind_R[ranks][:, None], item_PK].sum(axis=1)
        if self.cap_R is not None:
            self.held_R[ranks] = self.bytes_I[item_PK].sum(axis=1)
            self.full_R[ranks] = np.maximum(self.load_R[ranks], self.held_R[ranks] / self.cap_R[ranks])

    def exchange(self, full_P: np.ndarray, empty_P: np.ndarray) -> bool:
        """Best move or swap of each pair of ranks (of one full rank with all the others: the best of all)."""
        one = full_P.size == 1 < empty_P.size
        after = self._after(full_P, empty_P).reshape(empty_P.size, -1)
        best_P = after.argmin(axis=1)
        value_P = after[np.arange(empty_P.size), best_P]
        gains_P = value_P < self.full_R[full_P] * (1 - MIN_GAIN)
        if one:  # only one exchange may touch the full rank
            gains_P &= np.arange(empty_P.size) == value_P.argmin()
        if not gains_P.any():
            return False
        empty, (i, j) = empty_P[gains_P], np.divmod(best_P[gains_P], self.item_RK.shape[1])
        full = full_P if one else full_P[gains_P]
        self.item_RK[full, i], self.item_RK[empty, j] = self.item_RK[empty, j], self.item_RK[full, i]
        touched = np.concatenate([full, empty])
        if (self.item_RK[touched] != self.items).all(axis=1).any():  # a move took some rank's last empty place
            self.item_RK = np.pad(self.item_RK, ((0, 0), (0, 1)), constant_values=self.items)
        self._sum(touched)
        return True

    def _after(self, full_P: np.ndarray, empty_P: np.ndarray) -> np.ndarray:
        """[P, K, K] how full the fuller of two ranks is after place i of the one and j of the other change places."""
        mine, theirs = self.item_RK[full_P], self.item_RK[empty_P]
        load, other = self.load_R[full_P], self.load_R[empty_P]
        if self.cap_R is None and len(self.time_CI) == 1:
            # The larger of load - d and other + d, for what d the full rank loses.
            d = self.time_CI[0][mine][:, :, None] - self.time_CI[0][theirs][:, None, :]
            return np.abs(d - ((load - other) / 2)[:, None, None]) + ((load + other) / 2)[:, None, None]
        here, there = self.kind_R[full_P][:, None], self.kind_R[empty_P][:, None]
        time, load, other = self.time_CI, load[:, None, None], other[:, None, None]
        after = np.maximum(
            load - time[here, mine][:, :, None] + time[here, theirs][:, None, :],
            other - time[there, theirs][:, None, :] + time[there, mine][:, :, None],
        )
        if self.cap_R is None:
            return after
        more = self.bytes_I[theirs][:, None, :] - self.bytes_I[mine][:, :, None]
        held, other_held = self.held_R[full_P][:, None, None], self.held_R[empty_P][:, None, None]
        after = np.maximum(after, (held + more) / self.cap_R[full_P][:, None, None])
        return np.maximum(after, (other_held - more) / self.cap_R[empty_P][:, None, None])

    def owner_I(self) -> np.ndarray:
        owner_I = np.zeros(self.items + 1, dtype=int)
        owner_I[self.item_RK] = np.arange(self.kind_R.size)[:, None]
        return owner_I[:-1]
