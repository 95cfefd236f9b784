"""Cuts by width: move parts of experts from ranks over a target load to ranks under it.

Every cut brings one rank to the target and leaves it there, so ranks - 1 cuts are enough (McNaughton 1959),
and with widths that divide only into units the slowest rank is at most one unit's cost over the mean.
held[r] = {expert: width of its piece on rank r}; where a piece lies in its expert is decided later.
"""

import math
from collections.abc import Callable, Sequence

from hmoe_megatron.placement.cost import Cost

MAX_TARGETS = 12  # tried between the mean and the slowest whole-expert rank: 1 / 4096 of that distance
ROUNDING = 1e-12


def rank_loads(held: Sequence[dict[int, int]], tokens_E: Sequence[float], cost: Cost) -> list[float]:
    return [math.fsum(cost(tokens_E[e], F) for e, F in pieces.items()) for pieces in held]


def cut_bottlenecks(
    held: Sequence[dict[int, int]], tokens_E: Sequence[float], cost: Cost, max_cuts: int, multiple: int,
    slack: float,
) -> list[list[dict[int, int]]]:
    """Placements with cuts whose slowest rank is within `slack` of the mean, else the fastest one found.

    [] where `held`, which has whole experts, needs none or cuts don't help. At most max_cuts cuts, at multiples
    of `multiple`: at most one piece of an expert has a width that is no multiple.
    """
    loads = rank_loads(held, tokens_E, cost)
    mean, high = math.fsum(loads) / len(held), max(loads)

    def fit(target):
        return _Fit(held, loads, tokens_E, cost, multiple, target).run(max_cuts)

    low = mean * (1 + slack)
    if high <= low:
        return []
    even = [fitted for share in (0, 1 / 8, 1) if (fitted := fit(mean * (1 + share * slack)))]
    if even:
        return even
    best = None
    for _ in range(MAX_TARGETS):
        target = (low + high) / 2
        if fitted := fit(target):
            best, high = fitted, target
        else:
            low = target
    return [best] if best else []


class _Fit:
    """One attempt to bring every rank to at most `target`."""

    def __init__(self, held, loads, tokens_E, cost, multiple, target):
        self.held, self.loads = [dict(pieces) for pieces in held], list(loads)
        self.tokens_E, self.cost, self.multiple = tokens_E, cost, multiple
        self.target = target * (1 + ROUNDING)
        self.open = {rank for rank, load in enumerate(loads) if load < target}  # may still take something

    def run(self, max_cuts: int) -> list[dict[int, int]] | None:
        experts = sum(map(len, self.held))
        for rank in sorted(range(len(self.held)), key=lambda r: (-self.loads[r], r)):
            while self.loads[rank] > self.target:
                if not (self._move_whole(rank) or self._cut(rank)):
                    return None
        return self.held if sum(map(len, self.held)) - experts <= max_cuts else None

    def _move_whole(self, rank: int) -> bool:
        """Move the costliest piece that some rank has room for to the rank where it leaves the least room."""
        lightest = min((self.loads[d] for d in self.open), default=math.inf)
        for load, e in sorted((-self._load_of(rank, e), e) for e in self.held[rank]):
            load = -load
            if not load or (lightest + load > self.target and not any(e in self.held[d] for d in self.open)):
                continue
            after = {d: self.loads[d] + self._added(d, e, self.held[rank][e]) for d in self.open}
            fits = [d for d in after if after[d] <= self.target]
            if fits:
                self._transfer(rank, max(fits, key=lambda d: (after[d], -d)), e, self.held[rank][e])
                if self.loads[rank] < self.target:
                    self.open.add(rank)
                return True
        return False

    def _cut(self, rank: int) -> bool:
        """Move a part of one piece: what brings this rank to the target, else what fills the roomiest other."""
        excess = self.loads[rank] - self.target
        room = {d: self.target - self.loads[d] for d in self.open}
        receivers = sorted(room, key=lambda d: (
            room[d] < excess, room[d] if room[d] >= excess else -room[d], len(self.held[d]), d))
        # Few tokens first: they are the rows that travel to two ranks, and a unit of their width is fine.
        pieces = sorted((e for e in self.held[rank] if self._load_of(rank, e)),
                        key=lambda e: (self.tokens_E[e], e))
        for d in receivers:
            for e in pieces:
                most, need = self._units(rank, d, e)
                if most:
                    self._transfer(rank, d, e, min(most, need) * self.multiple)
                    if need > most:
                        self.open.discard(d)
                    return True
        return False

    def _units(self, rank: int, to: int, e: int) -> tuple[int, int]:
        """(most, need): cut units of expert e that `to` has room for, and that bring `rank` to the target."""
        units = (self.held[rank][e] - 1) // self.multiple
        if not units or self.loads[to] + self._added(to, e, self.multiple) > self.target:
            return 0, 0
        rest = self.loads[rank] - self._load_of(rank, e)

        def has_room(n: int) -> bool:
            return self.loads[to] + self._added(to, e, n * self.multiple) <= self.target

        def is_over(n: int) -> bool:
            return rest + self.cost(self.tokens_E[e], self.held[rank][e] - n * self.multiple) > self.target

        return _last(units, has_room), 1 + _last(units, is_over)

    def _load_of(self, rank: int, e: int) -> float:
        return self.cost(self.tokens_E[e], self.held[rank][e])

    def _added(self, rank: int, e: int, width: int) -> float:
        """Load that `width` more of expert e adds to a rank, which may hold a piece of it."""
        held = self.held[rank].get(e)
        return self.cost(self.tokens_E[e], width + (held or 0)) - (self._load_of(rank, e) if held else 0.0)

    def _transfer(self, source: int, to: int, e: int, width: int) -> None:
        self.held[to][e] = self.held[to].get(e, 0) + width
        self.held[source][e] -= width
        if not self.held[source][e]:
            del self.held[source][e]
        for rank in (source, to):
            self.loads[rank] = math.fsum(self._load_of(rank, e) for e in self.held[rank])


def _last(most: int, holds: Callable[[int], bool]) -> int:
    """Largest n of 0..most with holds(n), which never turns true again after it turned false; 0 if none."""
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if holds(middle) else (low, middle - 1)
    return low
