"""Plans of a layer and of a model: arguments checked, each layer solved, ranges laid out, predictions attached.

Letters: L MoE layers, E logical experts, F width of one expert.
Pure: the same input gives the same plan on every machine. Ties go to the lower index, limits are counts.
"""

import contextlib
import math
import numbers
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from hmoe_megatron.placement.bound import lower_bound
from hmoe_megatron.placement.cost import CostModel, predict
from hmoe_megatron.placement.plan import LayerPlan, Piece, PlacementPlan, layer_numbers
from hmoe_megatron.placement.problem import LayerProblem
from hmoe_megatron.placement.rank_assignment import even_bytes, relabel
from hmoe_megatron.placement.ranks import Rank, as_ranks, kinds
from hmoe_megatron.placement.solver import InfeasiblePlan, contiguous, solve
from hmoe_megatron.widths import MAX_EXPERTS, MAX_LAYERS, MAX_TOTAL_WIDTH, ranges_text

MAX_TOKENS = 1e18
LAST = (math.inf,)


def plan_layer(
    tokens_E: Sequence[float] | None,
    widths_E: Sequence[int],
    ranks: int | Sequence[Rank],
    cost: CostModel | None = None,
    max_cuts: int | None = None,
    cut_multiple: int = 1,
) -> LayerPlan:
    """The placement of one layer with the fastest slowest rank, under loads tokens_E (None: all experts equal).

    ranks: how many, or a Rank for each. cost: training FLOPs unless given. max_cuts: ranks - 1 unless given; 0 keeps
    experts whole. Cuts lie at multiples of cut_multiple. Never slower than contiguous whole experts that keep the caps,
    and equal to them where they are as fast; never slower than with max_cuts=0. With FLOPs as cost, ranks - 1 cuts and
    no caps the slowest rank is within EQUAL_TIME, or one cut_multiple of an expert, of the mean. Experts without tokens
    are spread by bytes.
    ValueError names the argument, its value and what it may be; InfeasiblePlan the ranks that lack bytes.
    """
    ranks, cost = as_ranks(ranks), cost or CostModel()
    widths, tokens = _checked(tokens_E, widths_E)
    max_cuts, cut_multiple = _cut_limits(max_cuts, cut_multiple, ranks)
    problem = LayerProblem.of(tokens, widths, ranks, cost, max_cuts, cut_multiple)
    bound = lower_bound(problem, whole=not max_cuts)
    return _layer_plan(solve(problem, bound), problem, ranks, cost, bound, kinds(ranks))


def _layer_plan(held, problem: LayerProblem, ranks, cost, bound: float, kind_R: Sequence[int]) -> LayerPlan:
    """Ranks of one kind are put in order."""
    pieces = _laid_out(held, problem.widths_E, kind_R, problem.unit)
    return predicted_layer(pieces, problem.widths_E, tuple(problem.tokens_E.tolist()), ranks, cost, bound)


def predicted_layer(pieces, widths, tokens, ranks, cost, bound: float | None = None) -> LayerPlan:
    """With what the pieces cost; without a bound, that with any cuts anywhere."""
    if bound is None:
        bound = lower_bound(LayerProblem.of(tokens, widths, ranks, cost, max_cuts=0, unit=1))
    return LayerPlan(pieces, widths, tokens, predict(pieces, tokens, cost, ranks, bound))


def plan_model(
    tokens_LE: Sequence[Sequence[float]] | None,
    widths_LE: Sequence[Sequence[int]],
    ranks: int | Sequence[Rank],
    cost: CostModel | None = None,
    max_cuts: int | None = None,
    cut_multiple: int = 1,
    stages: Sequence[int] = (),
    old: PlacementPlan | None = None,
    numbers: Sequence[int] = (),
) -> PlacementPlan:
    """`plan_layer` of every layer, ranks renamed layer by layer so that their bytes add up evenly.

    Layers may differ in widths and number of experts. stages: pipeline stage of each layer (default: one); the layers
    of a stage share a rank's bytes. old: a plan in force, for the same widths: ranks are renamed and cuts laid so that
    the fewest bytes move from it. numbers: decoder layer of each (default: in order). Raises as plan_layer does,
    InfeasiblePlan with the layers of the stage; of the ways to share caps among layers a few are tried.
    """
    ranks, cost = as_ranks(ranks), cost or CostModel()
    keys = [
        (None if tokens_E is None else tuple(tokens_E), tuple(widths_E))
        for tokens_E, widths_E in _layers(tokens_LE, widths_LE)
    ]
    stages = tuple(stages) or (0,) * len(keys)
    if len(stages) != len(keys):
        raise ValueError(f"stages: {len(stages)} pipeline stages for {len(keys)} layers; give one a layer")
    numbers = layer_numbers(numbers, len(keys))
    for n, stage in enumerate(stages):
        _check_whole(f"stages[{n}]", stage, 0, MAX_LAYERS)

    max_cuts, cut_multiple = _cut_limits(max_cuts, cut_multiple, ranks)

    uncapped = [replace(rank, bytes=None) for rank in ranks]
    plans = {key: plan_layer(*key, uncapped, cost, max_cuts, cut_multiple) for key in dict.fromkeys(keys)}
    layers = list(even_bytes([plans[key] for key in keys], ranks, stages))
    for stage in sorted(set(stages)):
        members = [n for n, of in enumerate(stages) if of == stage]
        if overflow([layers[n] for n in members], ranks):
            try:
                shared = _sharing_caps([keys[n] for n in members], ranks, cost, max_cuts, cut_multiple)
            except InfeasiblePlan as error:
                raise InfeasiblePlan(f"layers {ranges_text([numbers[n] for n in members])}: {error}") from None
            assert not overflow(shared, ranks), "a plan over a cap must not leave"
            for n, layer in zip(members, shared, strict=True):
                layers[n] = layer
    if old is not None:
        layers = relabel(layers, old.layers, ranks, stages, cut_multiple, numbers)
    return PlacementPlan(tuple(layers), cost, ranks, stages, numbers)


def overflow(layers: Sequence[LayerPlan], ranks: Sequence[Rank]) -> dict[int, int]:
    """Bytes that the layers of one pipeline stage take over the cap of each rank that they fill too much."""
    held_R = map(sum, zip(*(layer.predicted.bytes for layer in layers), strict=True))
    return {
        r: held - rank.bytes
        for r, (held, rank) in enumerate(zip(held_R, ranks, strict=True))
        if rank.bytes is not None and held > rank.bytes
    }


def _sharing_caps(keys, ranks, cost, max_cuts: int, unit: int) -> list[LayerPlan]:
    """The layers of a stage one after the other, each under a share of what is left of the caps.

    If no way to share is found: whole experts in order if these fit, else all layers at once. Raises InfeasiblePlan.
    """
    if len(keys) == 1:
        return [plan_layer(*keys[0], ranks, cost, max_cuts, unit)]
    need = [sum(plan_layer(*key, 1, cost).predicted.bytes) for key in keys]
    later = [sum(need[i + 1 :]) for i in range(len(need))]
    caps = sum(rank.bytes or 0 for rank in ranks)

    def by_need(i, left, cap):
        return left * need[i] // (need[i] + later[i])

    def what_later_ones_leave(i, left, cap):  # if these fill all ranks alike
        return max(left - -(-later[i] * cap // max(caps, 1)), 0)

    for share in (by_need, what_later_ones_leave):
        with contextlib.suppress(InfeasiblePlan):
            return _in_turn(keys, ranks, share, lambda key, budgets: plan_layer(*key, budgets, cost, max_cuts, unit))
    in_order = [
        contiguous_plan([widths_E], ranks, None if tokens_E is None else [tokens_E], cost).layers[0]
        for tokens_E, widths_E in keys
    ]
    return _at_once(keys, ranks, cost, max_cuts, unit) if overflow(in_order, ranks) else in_order


def _at_once(keys, ranks, cost, max_cuts, unit) -> list[LayerPlan]:
    """As if all experts were of one layer: their sum on each rank is balanced, not each layer."""
    problems = [
        LayerProblem.of(tokens, widths, ranks, cost, max_cuts, unit)
        for widths, tokens in (_checked(*key) for key in keys)
    ]
    tokens_X = np.concatenate([problem.tokens_E for problem in problems])
    widths_X = [width for problem in problems for width in problem.widths_E]
    together = LayerProblem.of(tokens_X, widths_X, ranks, cost, max_cuts, unit)
    held = solve(together, lower_bound(together, whole=not max_cuts))
    layers, first = [], 0
    for problem in problems:
        of_layer = range(first, first + len(problem.widths_E))
        mine = [{x - first: rank[x] for x in sorted(rank) if x in of_layer} for rank in held]
        bound = lower_bound(problem, whole=not max_cuts)
        # In another order the ranks of one layer would no longer fit those of the others: each is of its own kind.
        layers.append(_layer_plan(mine, problem, ranks, cost, bound, range(len(ranks))))
        first = of_layer.stop
    return layers


def _in_turn(keys, ranks, share, planned) -> list[LayerPlan]:
    left, layers = [rank.bytes for rank in ranks], []
    for i, key in enumerate(keys):
        budgets = [
            replace(rank, bytes=None if rest is None else share(i, rest, rank.bytes))
            for rank, rest in zip(ranks, left, strict=True)
        ]
        layers.append(planned(key, budgets))
        left = [
            None if rest is None else rest - held for rest, held in zip(left, layers[-1].predicted.bytes, strict=True)
        ]
    return layers


def contiguous_plan(
    widths_LE: Sequence[Sequence[int]],
    ranks: int | Sequence[Rank],
    tokens_LE: Sequence[Sequence[float]] | None = None,
    cost: CostModel | None = None,
    stages: Sequence[int] = (),
    numbers: Sequence[int] = (),
) -> PlacementPlan:
    """Whole experts in order, as stock Megatron places them; the first E % ranks ranks hold one more."""

    def owners(_, widths):
        return [rank for rank, held in enumerate(contiguous(widths, len(as_ranks(ranks)))) for _ in held]

    return whole_plan(owners, widths_LE, ranks, tokens_LE, cost, stages, numbers)


def whole_plan(
    owners: Callable[[Sequence[float], Sequence[int]], Sequence[int]],
    widths_LE: Sequence[Sequence[int]],
    ranks: int | Sequence[Rank],
    tokens_LE: Sequence[Sequence[float]] | None = None,
    cost: CostModel | None = None,
    stages: Sequence[int] = (),
    numbers: Sequence[int] = (),
) -> PlacementPlan:
    """Whole experts at given ranks: owners(tokens_E, widths_E) has the rank of each; caps are ignored."""
    ranks, cost, layers = as_ranks(ranks), cost or CostModel(), []
    for tokens_E, widths_E in _layers(tokens_LE, widths_LE):
        widths, tokens = _checked(tokens_E, widths_E)
        pieces: list[list[Piece]] = [[] for _ in ranks]
        for e, rank in enumerate(owners(tokens, widths)):
            pieces[rank].append(Piece(e, 0, widths[e]))
        layers.append(predicted_layer(tuple(map(tuple, pieces)), widths, tokens, ranks, cost))
    return PlacementPlan(tuple(layers), cost, ranks, stages, numbers)


def under(plan: PlacementPlan, other: PlacementPlan) -> PlacementPlan:
    """The pieces of `plan` with what they cost under the loads, ranks, cost and stages of `other`."""
    layers = tuple(
        predicted_layer(held.pieces, held.widths, to.tokens, other.rank_specs, other.cost)
        for held, to in zip(plan.layers, other.layers, strict=True)
    )
    return PlacementPlan(layers, other.cost, other.rank_specs, other.stages, other.numbers)


def _laid_out(
    held: Sequence[dict[int, int]], widths: Sequence[int], kind_R: Sequence[int], cut_multiple: int
) -> tuple[tuple[Piece, ...], ...]:
    """Ranges for the pieces; ranks of one kind in the order of their first piece, empty ranks last."""
    pieces: list[list[Piece]] = [[] for _ in held]
    holders: dict[int, list[int]] = {}  # of cut experts
    for r, rank in enumerate(held):
        for e, width in rank.items():
            if width == widths[e]:
                pieces[r].append(Piece(e, 0, width))
            else:
                holders.setdefault(e, []).append(r)
    for e, ranks in holders.items():
        lo = 0
        # The one piece that may be no multiple goes last, so that every cut falls on a multiple.
        for r in sorted(ranks, key=lambda r: (held[r][e] % cut_multiple != 0, min(held[r]), r)):  # noqa: B023 - at once
            pieces[r].append(Piece(e, lo, lo + held[r][e]))
            lo += held[r][e]
    for rank in pieces:
        rank.sort()
    ordered = {
        kind: iter(
            sorted(
                (rank for rank, k in zip(pieces, kind_R, strict=True) if k == kind),
                key=lambda rank: rank[0] if rank else LAST,
            )
        )
        for kind in set(kind_R)
    }
    return tuple(tuple(next(ordered[kind])) for kind in kind_R)


def _layers(tokens_LE, widths_LE):
    if not len(widths_LE):
        raise ValueError("widths_LE: no layer; give the widths of one MoE layer or more")
    if tokens_LE is None:
        return [(None, widths_E) for widths_E in widths_LE]
    if len(tokens_LE) != len(widths_LE):
        raise ValueError(
            f"tokens_LE has {len(tokens_LE)} layers, widths_LE {len(widths_LE)}; give loads for each layer"
        )
    return list(zip(tokens_LE, widths_LE, strict=True))


def _checked(tokens_E, widths_E) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """Widths and tokens of a layer as plain Python numbers."""
    if not 1 <= len(widths_E) <= MAX_EXPERTS:
        raise ValueError(f"widths_E: {len(widths_E)} experts (--num-experts); give 1 to {MAX_EXPERTS}")
    tokens_E = [1.0] * len(widths_E) if tokens_E is None else tokens_E
    if len(tokens_E) != len(widths_E):
        raise ValueError(
            f"tokens_E has {len(tokens_E)} loads, widths_E {len(widths_E)} experts; give one load an expert"
        )
    # Plain numbers pass by their types: a check by abstract class takes ten times as long.
    widths, tokens = (values.tolist() if isinstance(values, np.ndarray) else values for values in (widths_E, tokens_E))
    if set(map(type, widths)) != {int} or min(widths) < 1 or max(widths) > MAX_TOTAL_WIDTH:
        for e, F in enumerate(widths):
            _check_whole(f"widths_E[{e}] (--hmoe-widths)", F, 1, MAX_TOTAL_WIDTH)
        widths = map(int, widths)
    # The sum is NaN if one is, which min and max may overlook.
    if set(map(type, tokens)) != {float} or not (min(tokens) >= 0 and max(tokens) <= MAX_TOKENS and sum(tokens) >= 0):
        for e, m in enumerate(tokens):
            if isinstance(m, bool) or not isinstance(m, numbers.Real) or not 0 <= m <= MAX_TOKENS:
                raise ValueError(f"tokens_E[{e}] {m!r:.80}: a load is a number from 0 to {MAX_TOKENS:g}")
        tokens = map(float, tokens)
    return tuple(widths), tuple(tokens)


def _cut_limits(max_cuts: int | None, cut_multiple: int, ranks: Sequence[Rank]) -> tuple[int, int]:
    """(max_cuts, cut_multiple) as Python's numbers: whatever whole numbers they were, arithmetic on them is exact."""
    max_cuts = len(ranks) - 1 if max_cuts is None else max_cuts
    _check_whole("max_cuts (--hmoe-max-cuts)", max_cuts, 0)
    _check_whole("cut_multiple (--hmoe-cut-multiple)", cut_multiple, 1, MAX_TOTAL_WIDTH)
    return int(max_cuts), int(cut_multiple)


def _check_whole(name: str, value: int, least: int, most: int | None = None) -> None:
    whole = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    if not whole or not least <= value <= (most or value):
        raise ValueError(
            f"{name} {value!r:.80}: must be a whole number of at least {least}"
            + (f" and at most {most}" if most else "")
        )
