"""Cuts by width: a placement in which no rank takes longer than a target, or holds more than its cap.

An expert that fits on no rank is first cut into chunks that fill ranks. The chunks and the other experts are balanced
as whole items; then every rank that is still too full gives away what is too much, in one piece where it can. Each of
these cuts leaves its giver or its taker full, so ranks - 1 cuts are enough where a cut costs nothing (McNaughton 1959).
"""

import math
from bisect import bisect_left, insort

import numpy as np

from hmoe_megatron.placement.lpt import STARTS, from_many_starts, improve, largest_first
from hmoe_megatron.placement.problem import LayerProblem

Timed = tuple[list[dict[int, int]], float]  # a placement and the time of its slowest rank

ROUNDING = 1e-12
ROUNDS = 2  # of moves and swaps: what they leave is cut


def fit(problem: LayerProblem, target: float) -> Timed | None:
    """held[r] with every rank at most at `target` and its cap, at most max_cuts cuts; None if none is found.

    Cuts are at multiples of problem.unit: at most one piece of an expert has a width that is no multiple.
    """
    if not problem.max_cuts:
        return _fit_whole(problem, target)
    chunks = _chunks(problem, target)
    if chunks is None:
        return None
    items = problem.items(chunks)
    owner_I = improve(items, largest_first(items, target), target, ROUNDS)
    return _Shedding(problem, problem.held(chunks, owner_I), target).run()


def _fit_whole(problem: LayerProblem, target: float) -> Timed | None:
    items = problem.items(problem.whole)
    owner_I = improve(items, largest_first(items, target), target)
    owner_I = from_many_starts(items, owner_I, target, STARTS // 4)  # for one of many targets
    return _Shedding(problem, problem.held(problem.whole, owner_I), target).run()


def _chunks(problem: LayerProblem, target: float) -> list[tuple[int, int]] | None:
    """(expert, width) of all items: whole experts, and of those that fit no rank as many full ranks as they need."""
    widest_E = _widest(problem, target)
    chunks, too_wide = [], np.flatnonzero(widest_E < problem.widths_E)
    for e in too_wide.tolist():
        most = int(widest_E[e]) // problem.unit * problem.unit
        if most < 1:
            return None
        full, rest = divmod(problem.widths_E[e], most)
        if full > problem.ranks:
            return None
        chunks += [(e, most)] * full + [(e, rest)] * (rest > 0)
    wide = set(too_wide.tolist())
    return chunks + [(e, F) for e, F in enumerate(problem.widths_E) if e not in wide]


def _widest(problem: LayerProblem, target: float) -> np.ndarray:
    """[E] the widest piece that fits an empty rank of some kind."""
    with np.errstate(divide="ignore", invalid="ignore"):
        tiles_CE = (target * (1 + ROUNDING) - problem.fixed_CE) / (problem.slope_CE * problem.tile)
    widest_CE = np.where(problem.slope_CE > 0, np.floor(tiles_CE) * problem.tile, np.inf)
    if problem.capped:
        cap_C = np.zeros(len(problem.fixed_CE))
        np.maximum.at(cap_C, np.array(problem.kind_R), problem.cap_R)
        by_bytes_CE = np.floor((cap_C[:, None] - problem.piece_bytes_E) / problem.width_bytes_E)
        widest_CE = np.minimum(widest_CE, by_bytes_CE)
    return np.minimum(widest_CE.max(axis=0), problem.widths_E)


class _Shedding:
    """Ranks over the target give away parts of their pieces, or whole ones, to ranks with room."""

    def __init__(self, problem: LayerProblem, held: list[dict[int, int]], target: float):
        self.problem, self.held = problem, held
        self.target = target * (1 + ROUNDING)
        self.fixed, self.slope = problem.fixed_CE.tolist(), problem.slope_CE.tolist()
        self.tokens, self.load = problem.tokens_E.tolist(), problem.times(held)
        self.capped = problem.capped
        self.cap = problem.cap_R.tolist()
        if self.capped:
            self.piece_bytes, self.width_bytes = problem.piece_bytes_E.tolist(), problem.width_bytes_E.tolist()
            self.bytes = [math.fsum(problem.bytes(e, w) for e, w in pieces.items()) for pieces in held]
        # Ranks with room, by room: the smallest room that is enough is found by bisection.
        self.room = sorted((self.target - load, rank) for rank, load in enumerate(self.load) if load < self.target)

    def run(self) -> Timed | None:
        over = [r for r in range(self.problem.ranks) if self._is_over(r)]
        for rank in sorted(over, key=lambda r: (-self.load[r], r)):
            if self.load[rank] < self.target:  # over its cap alone: it gives, and takes nothing
                self.room.remove((self.target - self.load[rank], rank))
            while self._is_over(rank):
                if not self._give(rank):
                    return None
        cuts = sum(map(len, self.held)) - len(self.problem.widths_E)
        return (self.held, max(self.load)) if cuts <= self.problem.max_cuts else None

    def _is_over(self, rank: int) -> bool:
        return self.load[rank] > self.target or (self.capped and self.bytes[rank] > self.cap[rank])

    def _give(self, rank: int) -> bool:
        """A gift that brings `rank` under; else the gift that fills the roomiest other rank."""
        # Few tokens first: they are the rows that travel to two ranks, and a unit of their width is fine.
        experts = sorted(self.held[rank], key=lambda e: (self.tokens[e], e))
        for e in experts:
            if (gift := self._enough(rank, e)) and (to := self._taker(rank, e, *gift)) is not None:
                self._move(rank, to, e, gift[0])
                return True
        if not self.problem.max_cuts:
            return False
        for _, to in self.room[::-1]:
            for e in experts:
                if width := self._most(rank, to, e):
                    self._move(rank, to, e, width)
                    return True
        return False

    def _enough(self, rank: int, e: int) -> tuple[int, float] | None:
        """(width, its time on this kind of rank): the least of piece e that brings `rank` to the target and its cap."""
        kind, width, unit, tile = self.problem.kind_R[rank], self.held[rank][e], self.problem.unit, self.problem.tile
        fixed, slope = self.fixed[kind][e], self.slope[kind][e]
        keep = width
        if self.load[rank] > self.target:
            padded = -(-width // tile) * tile
            spare = self.target - (self.load[rank] - fixed - slope * padded)
            if not slope:
                return None
            keep = math.floor((spare - fixed) / slope / tile) * tile if spare > fixed else 0
        if self.capped and self.bytes[rank] > self.cap[rank]:
            spare = self.cap[rank] - (self.bytes[rank] - self.problem.bytes(e, width))
            keep = min(keep, math.floor((spare - self.piece_bytes[e]) / self.width_bytes[e]))
        give = -(-(width - max(keep, 0)) // unit) * unit if self.problem.max_cuts else width
        if give >= width or keep <= 0:
            give = width
            if self.load[rank] - self._time(rank, e, width) > self.target:
                return None
        elif give <= 0:
            return None
        return give, fixed + slope * (-(-give // tile) * tile)

    def _load(self, rank: int) -> float:
        """Summed anew: what rounding adds does not accumulate over moves."""
        kind, tile, load = self.problem.kind_R[rank], self.problem.tile, 0.0
        fixed_E, slope_E = self.fixed[kind], self.slope[kind]
        for e, width in self.held[rank].items():
            load += fixed_E[e] + slope_E[e] * (-(-width // tile) * tile)
        return load

    def _time(self, rank: int, e: int, width: int) -> float:
        kind, tile = self.problem.kind_R[rank], self.problem.tile
        return self.fixed[kind][e] + self.slope[kind][e] * (-(-width // tile) * tile)

    def _taker(self, rank: int, e: int, width: int, time: float) -> int | None:
        """The rank with the least room that is enough for this piece."""
        least = 0 if len(self.fixed) > 1 else bisect_left(self.room, (time * (1 - ROUNDING), -1))
        for room, to in self.room[least:]:
            if self._added(to, e, width) <= room and self._has_bytes(to, e, width):
                return to
        return None

    def _added(self, to: int, e: int, width: int) -> float:
        """Time that `width` more of expert e adds to a rank, which may hold a piece of it."""
        kind, tile = self.problem.kind_R[to], self.problem.tile
        before = self.held[to].get(e, 0)
        padded = -(-(before + width) // tile) * tile - -(-before // tile) * tile
        return (0.0 if before else self.fixed[kind][e]) + self.slope[kind][e] * padded

    def _has_bytes(self, to: int, e: int, width: int) -> bool:
        if not self.capped:
            return True
        fixed = 0.0 if e in self.held[to] else self.piece_bytes[e]
        return self.bytes[to] + fixed + self.width_bytes[e] * width <= self.cap[to]

    def _most(self, rank: int, to: int, e: int) -> int:
        """Widest part of piece e, in cut units, that `to` has room for; the piece must not be used up."""
        kind, unit, tile = self.problem.kind_R[to], self.problem.unit, self.problem.tile
        before, fixed, slope = self.held[to].get(e, 0), self.fixed[kind][e], self.slope[kind][e]
        most = (self.held[rank][e] - 1) // unit * unit
        room = self.target - self.load[to] - (0.0 if before else fixed)
        if slope:
            padded = -(-before // tile) * tile
            most = min(most, padded + math.floor(room / slope / tile) * tile - before) if room > 0 else 0
        if self.capped:
            room = self.cap[to] - self.bytes[to] - (0.0 if before else self.piece_bytes[e])
            most = math.floor(min(most, room / self.width_bytes[e]))  # a rank without a cap has infinite room
        return max(most // unit * unit, 0)

    def _move(self, source: int, to: int, e: int, width: int) -> None:
        room = (self.target - self.load[to], to)
        self.room.pop(bisect_left(self.room, room))
        self.held[to][e] = self.held[to].get(e, 0) + width
        self.held[source][e] -= width
        if not self.held[source][e]:
            del self.held[source][e]
        for rank in (source, to):
            self.load[rank] = self._load(rank)
            if self.capped:
                self.bytes[rank] = math.fsum(self.problem.bytes(x, w) for x, w in self.held[rank].items())
            if self.load[rank] < self.target and not self._is_over(rank):
                insort(self.room, (self.target - self.load[rank], rank))
