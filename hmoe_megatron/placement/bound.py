"""Lower bounds on the time of the slowest rank: no plan is faster, so a plan's gap to it is its proof."""

import numpy as np

from hmoe_megatron.placement.problem import LayerProblem

ROUNDING = 1e-12
STEPS = 20  # of the search for the bound with cuts: it is exact to a millionth of its first interval


def lower_bound(problem: LayerProblem, whole: bool = False) -> float:
    """Of all placements with as many cuts as one likes, or of those of whole experts.

    Never falls when loads grow, never rises when ranks are added or cuts allowed.
    """
    whole_CE = problem.whole_CE
    if not whole_CE.any():
        return 0.0
    if whole:
        return max(_even_share(problem, 1), float(whole_CE.min(axis=0).max()), _crowded(problem, whole_CE))
    low = _even_share(problem, 1)
    if not problem.fixed_CE.any():  # pieces cost nothing
        return low
    high = float(whole_CE.min(axis=0).sum())
    for _ in range(STEPS):
        middle = (low + high) / 2
        if _may_fit(problem, middle):
            high = middle
        else:
            low = middle
    return low


def _even_share(problem: LayerProblem, pieces_E) -> float:
    """The time in which all ranks together could do the work of this many pieces of each expert.

    With s_r the speed of rank r, s_r slope_r and s_r (fixed_r - travel) are the same on all ranks, so the sum over
    ranks of s_r times its time is at least the work, whichever rank does it.
    """
    speed_C, ranks_C = problem.speed_C, np.bincount(problem.kind_R)
    work_E = (speed_C[:, None] * (problem.fixed_CE * pieces_E + problem.slope_CE * problem.padded_E)).min(axis=0)
    return float(work_E.sum() / (ranks_C * speed_C).sum())


def _may_fit(problem: LayerProblem, time: float) -> bool:
    """False if no placement is that fast: an expert needs enough pieces that each fits a rank, and all their work."""
    with np.errstate(divide="ignore", invalid="ignore"):
        widest_CE = np.where(problem.slope_CE > 0, (time - problem.fixed_CE) / problem.slope_CE, np.inf)
    F, unit, tile = np.array(problem.widths_E), problem.unit, problem.tile
    widest_E = np.minimum(widest_CE.max(axis=0) * (1 + ROUNDING), F.max() + tile) // tile * tile
    cut_E = widest_E // unit * unit  # pieces are multiples of the unit, but for the last of a width that is none
    last_E = np.where(F % unit, widest_E, cut_E)
    if ((widest_E < F) & (cut_E <= 0)).any():
        return False
    pieces_E = np.where(widest_E >= F, 1, 1 + np.ceil((F - last_E) / np.maximum(cut_E, 1)))
    return bool((pieces_E <= problem.ranks).all()) and _even_share(problem, pieces_E) <= time


def _crowded(problem: LayerProblem, whole_CE: np.ndarray) -> float:
    """Of k R + 1 whole experts some rank holds k + 1, so at least the k + 1 fastest of them."""
    fastest = np.sort(whole_CE.min(axis=0))[::-1]
    sums = np.concatenate([[0.0], np.cumsum(fastest)])
    ends = np.arange(problem.ranks + 1, fastest.size + 1, problem.ranks)  # k R + 1 for k = 1, 2, ...
    return max((float(sums[end] - sums[end - k - 2]) for k, end in enumerate(ends)), default=0.0)
