"""One layer: whole experts by longest processing time with moves and swaps, then cuts where they pay.

held[r] = {expert: width of its piece on rank r} is a placement before its ranges are laid out.
"""

import heapq
import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from hmoe_megatron.placement.bound import lower_bound
from hmoe_megatron.placement.lpt import CLOSE, FEW_ITEMS, from_many_starts, improve, largest_first
from hmoe_megatron.placement.milp import any_that_fits, fastest
from hmoe_megatron.placement.problem import LayerProblem
from hmoe_megatron.placement.width_splitting import Timed, fit

# A cut is taken only if the slowest rank gets faster by more than this share: each piece is a slot to permute into.
EQUAL_TIME = 0.002
REFINEMENTS = 4  # halvings of the interval in which the fastest placement with cuts lies
EXACT_PAIRS = 512  # of expert and rank: what HiGHS is given
EXACT_NODES = 5_000
ROUNDING = 1e-9
MAX_NAMED = 8


class InfeasiblePlan(ValueError):
    """No placement that keeps every rank under its cap: the text names ranks, missing bytes and remedies."""


def solve(problem: LayerProblem, bound: float) -> list[dict[int, int]]:
    """The fastest placement found that no cap forbids; of equally fast ones, that with fewest pieces."""
    if bound:
        held = _uncapped(problem.without_caps(), bound)
    else:  # no expert has tokens: nothing to balance but the bytes
        held = _uncapped(problem.of_bytes(), lower_bound(problem.of_bytes(), whole=True))
    if not problem.capped:
        return held
    held = _by_cap(problem, held)
    return _capped(problem, bound) if any(problem.overflow(held)) else held


def _by_cap(problem: LayerProblem, held: list[dict[int, int]]) -> list[dict[int, int]]:
    """The same with the fullest ranks of each kind where the caps are the largest."""
    held_bytes = problem.held_bytes(held)
    placed = list(held)
    for kind in set(problem.kind_R):
        ranks = [r for r, of in enumerate(problem.kind_R) if of == kind]
        by_bytes = sorted(ranks, key=lambda r: held_bytes[r])
        for source, to in zip(by_bytes, sorted(ranks, key=lambda r: problem.cap_R[r]), strict=True):
            placed[to] = held[source]
    return placed if any(problem.overflow(held)) else held


def _uncapped(problem: LayerProblem, bound: float) -> list[dict[int, int]]:
    busy = np.flatnonzero(problem.slope_CE.any(axis=0) | problem.fixed_CE.any(axis=0)).tolist()
    if len(busy) == len(problem.widths_E):
        return _busy(problem, bound)[0]
    held, time = _busy(problem.only(busy), bound)
    in_order = contiguous(problem.widths_E, problem.ranks)
    if max(problem.times(in_order)) <= time * (1 + ROUNDING):
        return in_order
    held = [{busy[e]: width for e, width in pieces.items()} for pieces in held]
    _spread_idle(problem, held, sorted(set(range(len(problem.widths_E))) - set(busy)))
    return held


def _busy(problem: LayerProblem, bound: float) -> Timed:
    """The fastest placement found where every expert has tokens."""
    none_is_faster = lower_bound(problem, whole=True) * (1 - EQUAL_TIME)  # of whole experts
    if problem.max_cuts and none_is_faster > bound * (1 + EQUAL_TIME) and (cut := _cut(problem, bound, none_is_faster)):
        return cut
    held, time = _whole(problem)
    pays = problem.max_cuts and time > bound * (1 + EQUAL_TIME)
    if pays and (cut := _cut(problem, bound, time * (1 - EQUAL_TIME))):
        return cut
    return held, time


def _whole(problem: LayerProblem) -> Timed:
    """Whole experts: longest first with moves and swaps; where that is not close to the bound, other ways too."""
    experts = len(problem.widths_E)
    items, bound = problem.items(problem.whole), lower_bound(problem, whole=True)
    best = improve(items, largest_first(items, bound), bound)
    if items.slowest(best) > bound * (1 + CLOSE):
        other = largest_first(items, bound, most_a_rank=-(-experts // problem.ranks))
        if items.slowest(best) > bound * (1 + EQUAL_TIME):
            other = improve(items, other, bound)
        best = min(best, other, key=items.slowest)
        best = from_many_starts(items, best, bound)
    in_order = np.repeat(np.arange(problem.ranks), list(map(len, contiguous(problem.widths_E, problem.ranks))))
    if items.slowest(in_order) <= items.slowest(best) * (1 + ROUNDING):
        best = in_order
    return problem.held(problem.whole, best), items.slowest(best)


def _cut(problem: LayerProblem, bound: float, most: float) -> Timed | None:
    """The fastest placement with cuts that is faster than `most`, to a fraction of its gap to the bound."""
    # A target equal to the bound wants every rank exactly full, which takes luck that only few experts have.
    slack, low, found = 0.0 if len(problem.widths_E) <= FEW_ITEMS else EQUAL_TIME, bound, None
    while bound * (1 + slack) < most and (found := fit(problem, bound * (1 + slack))) is None:
        low, slack = bound * (1 + slack), max(EQUAL_TIME, 2 * slack)
    if found is None and (found := fit(problem, most)) is None:
        return None
    return _refined(problem, found, low)


def _capped(problem: LayerProblem, bound: float) -> list[dict[int, int]]:
    """The fastest placement found in which every rank is under its cap. Raises InfeasiblePlan if there is none."""
    best, shortest = None, math.inf
    whole = replace(problem, max_cuts=0)
    whole_bound = lower_bound(whole, whole=True)
    ways = [
        (lambda: contiguous(problem.widths_E, problem.ranks), ROUNDING),
        (lambda: _by_cap(whole, _uncapped(whole.without_caps(), whole_bound)) if bound else None, ROUNDING),
        (lambda: _under_caps(whole, whole_bound), ROUNDING),
        # Two limits at once are more than moves and swaps are good for: up to 7 % above the optimum with few experts.
        (lambda: fastest(whole, EXACT_NODES).held if len(problem.widths_E) <= FEW_ITEMS else None, ROUNDING),
        (lambda: _under_caps(problem, bound) if problem.max_cuts else None, EQUAL_TIME),
    ]
    for way, gain in ways:
        if shortest <= bound * (1 + EQUAL_TIME):
            break
        if (held := way()) and not any(problem.overflow(held)) and max(problem.times(held)) < shortest * (1 - gain):
            best, shortest = held, max(problem.times(held))
    return best or _last_resort(problem)


def _under_caps(problem: LayerProblem, bound: float) -> list[dict[int, int]] | None:
    longest = float(problem.whole_CE.max(axis=0).sum()) or 1.0
    found = fit(problem, longest)  # the caps alone
    if found is None or not bound:
        return found and found[0]
    low, target = bound, bound * (1 + EQUAL_TIME)
    while target < found[1]:
        if faster := fit(problem, target):
            found = faster
            break
        low, target = target, bound + 2 * (target - bound)
    return _refined(problem, found, low)[0]


def _refined(problem: LayerProblem, found: Timed, low: float) -> Timed:
    """`found` or a faster placement; none was found as fast as `low`."""
    for _ in range(REFINEMENTS):
        if found[1] <= low * (1 + EQUAL_TIME):
            break
        middle = (low + found[1]) / 2
        if (faster := fit(problem, middle)) is None:
            low = middle
        else:
            found = faster
    return found


def _last_resort(problem: LayerProblem) -> list[dict[int, int]]:
    """By bytes alone, then by HiGHS, where the layer is small enough. Raises InfeasiblePlan."""
    items = problem.items(problem.whole)
    alike = problem.held(problem.whole, largest_first(items, target=math.inf))
    lacking = {r: missing for r, missing in enumerate(problem.overflow(alike)) if missing}
    if not lacking:
        return alike
    needed, pairs = items.bytes_I.sum(), len(problem.widths_E) * problem.ranks
    certain = needed > problem.cap_R.sum()  # a cut adds bytes
    if not certain and pairs <= EXACT_PAIRS:
        for max_cuts in sorted({0, problem.max_cuts}):  # without cuts it answers sooner
            found = any_that_fits(replace(problem, max_cuts=max_cuts), EXACT_NODES)
            if found.held is not None:
                return found.held
        certain = found.proven
    raise InfeasiblePlan(_shortage(problem, needed, lacking, certain))


def _shortage(problem: LayerProblem, needed: float, lacking: dict[int, float], certain: bool) -> str:
    """What each rank lacks if they are filled alike, and what would help."""
    most, least = max(lacking.values()), min(lacking.values())
    if len(lacking) == problem.ranks > MAX_NAMED and most <= 1.01 * least:
        named = [f"each of the {problem.ranks} ranks lacks {size_text(most)}"]
    else:
        named = [f"rank {r} lacks {size_text(missing)}" for r, missing in list(lacking.items())[:MAX_NAMED]]
        named += [f"{len(lacking) - MAX_NAMED} ranks more"] * (len(lacking) > MAX_NAMED)
    remedies = [
        "more ranks (--expert-model-parallel-size)",
        "a smaller micro-batch (--micro-batch-size)",
        "higher caps",
    ]
    if problem.max_cuts < problem.ranks - 1:
        remedies.insert(0, f"more cuts than {problem.max_cuts} (--hmoe-max-cuts)")
    return (
        f"experts of {size_text(needed)} {'do not fit' if certain else 'were not made to fit'} under the caps of "
        f"{problem.ranks} ranks, {size_text(problem.cap_R.sum())} in all; filled alike, {', '.join(named)}. "
        f"What would help: {', '.join(remedies)}"
    )


def size_text(size_bytes: float) -> str:
    """For people: exact where it is small."""
    return f"{size_bytes:,.0f} bytes" if size_bytes < 1 << 24 else f"{size_bytes / 2**30:,.2f} GiB"


def contiguous(widths: Sequence[int], ranks: int) -> list[dict[int, int]]:
    """Experts in order, E // ranks a rank as in stock Megatron; the first E % ranks ranks hold one more."""
    share, more = divmod(len(widths), ranks)
    starts = [rank * share + min(rank, more) for rank in range(ranks + 1)]
    return [{e: widths[e] for e in range(starts[r], starts[r + 1])} for r in range(ranks)]


def _spread_idle(problem: LayerProblem, held: list[dict[int, int]], idle: Sequence[int]) -> None:
    """Add experts without tokens to `held`, in place, the largest first, so that bytes even out."""
    emptiest = [(math.fsum(problem.bytes(e, w) for e, w in pieces.items()), rank) for rank, pieces in enumerate(held)]
    heapq.heapify(emptiest)
    for e in sorted(idle, key=lambda e: (-problem.widths_E[e], e)):
        held_bytes, rank = heapq.heappop(emptiest)
        held[rank][e] = problem.widths_E[e]
        heapq.heappush(emptiest, (held_bytes + problem.bytes(e, problem.widths_E[e]), rank))
