"""Whole experts on ranks: longest processing time first, then moves and swaps of the slowest rank.

held[r] = {expert: width of its piece on rank r}; here every piece is a whole expert.
"""

import heapq
import math
from collections.abc import Sequence

import numpy as np

MIN_GAIN = 1e-9  # of the slowest rank's load; less is rounding


def contiguous(widths: Sequence[int], ranks: int) -> list[dict[int, int]]:
    """Experts in order, E // ranks a rank as in stock Megatron; the first E % ranks ranks hold one more."""
    share, more = divmod(len(widths), ranks)
    starts = [rank * share + min(rank, more) for rank in range(ranks + 1)]
    return [{e: widths[e] for e in range(starts[r], starts[r + 1])} for r in range(ranks)]


def balance_whole_experts(
    cost_E: Sequence[float], widths: Sequence[int], ranks: int
) -> list[dict[int, int]]:
    """Whole experts with a low largest sum of cost_E over a rank (at most 4/3 of the least; Graham 1969).

    Experts of no cost are left out, for `spread_idle` to place.
    """
    cost = np.array(cost_E, dtype=float)
    # Moves and swaps can get stuck behind the longest first, so a start in plain turns is tried too.
    starts = _longest_first(cost_E, widths, ranks), np.arange(len(cost_E)) % ranks
    owner_E = min((_improve(cost, start, ranks) for start in starts), key=lambda o: max(_loads(cost, o, ranks)))
    held = [{} for _ in range(ranks)]
    for e in np.flatnonzero(cost_E).tolist():
        held[owner_E[e]][e] = widths[e]
    return held


def spread_idle(held: Sequence[dict[int, int]], cost_E: Sequence[float], widths: Sequence[int]) -> None:
    """Add the experts of no cost to `held`, in place, so that the sums of widths even out."""
    narrowest = [(sum(experts.values()), rank) for rank, experts in enumerate(held)]
    heapq.heapify(narrowest)
    for e in sorted((e for e, c in enumerate(cost_E) if not c), key=lambda e: (-widths[e], e)):
        width, rank = heapq.heappop(narrowest)
        held[rank][e] = widths[e]
        heapq.heappush(narrowest, (width + widths[e], rank))


def _longest_first(cost_E: Sequence[float], widths: Sequence[int], ranks: int) -> np.ndarray:
    """Rank of each expert: in falling order of cost, each to the rank with the least load so far."""
    owner_E = np.zeros(len(cost_E), dtype=int)
    least_loaded = [(0.0, 0, rank) for rank in range(ranks)]
    for e in sorted(range(len(cost_E)), key=lambda e: (-cost_E[e], -widths[e], e)):
        load, width, rank = heapq.heappop(least_loaded)
        owner_E[e] = rank
        heapq.heappush(least_loaded, (load + cost_E[e], width + widths[e], rank))
    return owner_E


def _loads(cost_E: np.ndarray, owner_E: np.ndarray, ranks: int) -> list[float]:
    return [math.fsum(cost_E[owner_E == rank]) for rank in range(ranks)]


def _improve(cost_E: np.ndarray, owner_E: np.ndarray, ranks: int) -> np.ndarray:
    """Move an expert off the slowest rank, or swap it for a cheaper one, while the larger load falls."""
    owner_E = owner_E.copy()
    load_R = np.array(_loads(cost_E, owner_E, ranks))
    # A move is a swap for one of `ranks` dummies without cost, one a rank.
    partner_cost = np.concatenate([cost_E, np.zeros(ranks)])
    for _ in range(4 * len(cost_E)):  # each round lowers the sorted loads; the limit only bounds the time
        slowest = int(load_R.argmax())
        mine = np.flatnonzero((owner_E == slowest) & (cost_E > 0))
        if not mine.size:
            break
        partner_rank = np.concatenate([owner_E, np.arange(ranks)])
        shift = cost_E[mine][:, None] - partner_cost[None, :]
        larger = np.maximum(load_R[slowest] - shift, load_R[partner_rank][None, :] + shift)
        larger[:, partner_rank == slowest] = np.inf
        i, partner = divmod(int(larger.argmin()), partner_cost.size)
        if not larger[i, partner] < load_R[slowest] * (1 - MIN_GAIN):
            break
        other = int(partner_rank[partner])
        owner_E[mine[i]] = other
        if partner < cost_E.size:
            owner_E[partner] = slowest
        for rank in (slowest, other):
            load_R[rank] = math.fsum(cost_E[owner_E == rank])
    return owner_E
