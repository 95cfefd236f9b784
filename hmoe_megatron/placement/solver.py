"""The planner: whole experts by longest processing time with moves and swaps, then cuts where they pay.

Letters: L MoE layers, E logical experts, F width of one expert.
Pure: the same input gives the same plan on every machine. Sums are math.fsum, ties go to the lower index.
held[r] = {expert: width of its piece on rank r} is a placement before its ranges are laid out.
"""

import math
import numbers
from collections.abc import Sequence

from hmoe_megatron.placement.cost import Cost, FlopsCost, predict
from hmoe_megatron.placement.cuts import cut_bottlenecks, rank_loads
from hmoe_megatron.placement.plan import LayerPlan, Piece, PlacementPlan
from hmoe_megatron.placement.plan_checks import MAX_RANKS
from hmoe_megatron.placement.whole import balance_whole_experts, contiguous, spread_idle
from hmoe_megatron.widths import MAX_EXPERTS, MAX_TOTAL_WIDTH

# Plans within this share of the fastest count as equal, and the one with fewest pieces wins: each piece is a
# slot to permute into, and its rows travel.
EQUAL_TIME = 0.002
MAX_TOKENS = 1e18


def plan_layer(
    tokens_E: Sequence[float] | None,
    widths_E: Sequence[int],
    ranks: int,
    cost: Cost | None = None,
    max_cuts: int | None = None,
    cut_multiple: int = 1,
    hidden_size: int = 1,
) -> LayerPlan:
    """The placement of one layer with the fastest slowest rank, under loads tokens_E (None: all experts equal).

    cost: training FLOPs at hidden_size unless given. max_cuts: ranks - 1 unless given; 0 keeps experts whole.
    Cuts lie at multiples of cut_multiple. hidden_size scales predicted FLOPs and parameters, not the placement.
    Never slower than contiguous whole experts, and equal to them where they are as fast. With FLOPs as cost
    and ranks - 1 cuts the slowest rank is within EQUAL_TIME, or one cut_multiple of an expert, of the mean.
    Experts without tokens are spread by width. ValueError names the argument, its value and what it may be.
    """
    widths, tokens = _checked(tokens_E, widths_E, ranks)
    max_cuts = ranks - 1 if max_cuts is None else max_cuts
    _check_whole("max_cuts (--hmoe-max-cuts)", max_cuts, 0)
    _check_whole("cut_multiple (--hmoe-cut-multiple)", cut_multiple, 1)
    _check_whole("hidden_size (--hidden-size)", hidden_size, 1)
    cost = cost or FlopsCost(hidden_size)
    cost_E = [cost(m, F) for m, F in zip(tokens, widths, strict=True)]
    bound = math.fsum(cost_E) / ranks if max_cuts else max(math.fsum(cost_E) / ranks, *cost_E)
    if any(cost_E):
        held = _fastest(cost_E, tokens, widths, ranks, cost, max_cuts, cut_multiple)
    else:  # nothing to balance but the parameters
        held = _fastest(list(map(float, widths)), [1.0] * len(widths), widths, ranks, FlopsCost(), 0, 1)
    pieces = _laid_out(held, cut_multiple)
    return LayerPlan(pieces, widths, tokens, predict(pieces, tokens, cost, hidden_size, bound))


def plan_model(
    tokens_LE: Sequence[Sequence[float]] | None,
    widths_LE: Sequence[Sequence[int]],
    ranks: int,
    cost: Cost | None = None,
    max_cuts: int | None = None,
    cut_multiple: int = 1,
    hidden_size: int = 1,
) -> PlacementPlan:
    """`plan_layer` of every layer; layers with the same loads and widths get the same plan."""
    plans: dict = {}
    keys = [(None if tokens_E is None else tuple(tokens_E), tuple(widths_E))
            for tokens_E, widths_E in _layers(tokens_LE, widths_LE)]
    for key in dict.fromkeys(keys):
        plans[key] = plan_layer(*key, ranks, cost, max_cuts, cut_multiple, hidden_size)
    return PlacementPlan(tuple(plans[key] for key in keys))


def contiguous_plan(
    widths_LE: Sequence[Sequence[int]],
    ranks: int,
    tokens_LE: Sequence[Sequence[float]] | None = None,
    cost: Cost | None = None,
    hidden_size: int = 1,
) -> PlacementPlan:
    """Whole experts in order, as stock Megatron places them; the first E % ranks ranks hold one more."""
    _check_whole("hidden_size (--hidden-size)", hidden_size, 1)
    cost, layers = cost or FlopsCost(hidden_size), []
    for tokens_E, widths_E in _layers(tokens_LE, widths_LE):
        widths, tokens = _checked(tokens_E, widths_E, ranks)
        pieces = tuple(tuple(Piece(e, 0, F) for e, F in rank.items()) for rank in contiguous(widths, ranks))
        bound = math.fsum(map(cost, tokens, widths)) / ranks
        layers.append(LayerPlan(pieces, widths, tokens, predict(pieces, tokens, cost, hidden_size, bound)))
    return PlacementPlan(tuple(layers))


def _fastest(cost_E, tokens, widths, ranks, cost, max_cuts, cut_multiple) -> list[dict[int, int]]:
    """The fastest of contiguous, balanced and cut placements; among those as fast, one with fewest pieces."""
    whole = balance_whole_experts(cost_E, widths, ranks)
    balanced = [whole]
    if max_cuts:
        balanced += cut_bottlenecks(whole, tokens, cost, max_cuts, cut_multiple, EQUAL_TIME)
    for held in balanced:
        spread_idle(held, cost_E, widths)
    candidates = [contiguous(widths, ranks), *balanced]
    times = [max(rank_loads(held, tokens, cost)) for held in candidates]
    equal = [n for n, time in enumerate(times) if time <= min(times) * (1 + EQUAL_TIME)]

    def preference(n: int):
        pieces = [len(rank) for rank in candidates[n]]
        return sum(pieces), max(pieces), times[n], n

    return candidates[min(equal, key=preference)]


def _laid_out(held: Sequence[dict[int, int]], cut_multiple: int) -> tuple[tuple[Piece, ...], ...]:
    """Ranges for the pieces, ranks in the order of their first piece, empty ranks last."""
    held = sorted(held, key=lambda rank: (not rank, sorted(rank)))
    pieces = [[] for _ in held]
    for e in sorted({e for rank in held for e in rank}):
        # The one piece that may be no multiple goes last, so that every cut falls on a multiple.
        holders = sorted((rank[e] % cut_multiple != 0, r) for r, rank in enumerate(held) if e in rank)
        lo = 0
        for _, r in holders:
            pieces[r].append(Piece(e, lo, lo + held[r][e]))
            lo += held[r][e]
    return tuple(sorted(map(tuple, pieces), key=lambda rank: (not rank, rank)))


def _layers(tokens_LE, widths_LE):
    if not len(widths_LE):
        raise ValueError("widths_LE: no layer; give the widths of one MoE layer or more")
    if tokens_LE is None:
        return [(None, widths_E) for widths_E in widths_LE]
    if len(tokens_LE) != len(widths_LE):
        raise ValueError(f"tokens_LE has {len(tokens_LE)} layers, widths_LE {len(widths_LE)}; give loads for "
                         "each layer")
    return list(zip(tokens_LE, widths_LE, strict=True))


def _checked(tokens_E, widths_E, ranks) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """Widths and tokens of a layer as plain Python numbers."""
    _check_whole("ranks (--expert-model-parallel-size)", ranks, 1, MAX_RANKS)
    if not 1 <= len(widths_E) <= MAX_EXPERTS:
        raise ValueError(f"widths_E: {len(widths_E)} experts (--num-experts); give 1 to {MAX_EXPERTS}")
    for e, F in enumerate(widths_E):
        _check_whole(f"widths_E[{e}] (--hmoe-widths)", F, 1, MAX_TOTAL_WIDTH)
    tokens_E = [1.0] * len(widths_E) if tokens_E is None else tokens_E
    if len(tokens_E) != len(widths_E):
        raise ValueError(f"tokens_E has {len(tokens_E)} loads, widths_E {len(widths_E)} experts; give one load "
                         "an expert")
    for e, m in enumerate(tokens_E):
        if isinstance(m, bool) or not isinstance(m, numbers.Real) or not 0 <= m <= MAX_TOKENS:
            raise ValueError(f"tokens_E[{e}] {m!r:.80}: a load is a number from 0 to {MAX_TOKENS:g}")
    return tuple(map(int, widths_E)), tuple(map(float, tokens_E))


def _check_whole(name: str, value: int, least: int, most: int | None = None) -> None:
    whole = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    if not whole or not least <= value <= (most or value):
        raise ValueError(f"{name} {value!r:.80}: must be a whole number of at least {least}"
                         + (f" and at most {most}" if most else ""))
