"""Moves from plan to plan: what they change, applied unit by unit, and what they weigh."""

import random
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from hmoe_megatron.placement.cost import CostModel, predict
from hmoe_megatron.placement.moves import Move, diff, moved_bytes
from hmoe_megatron.placement.plan import LayerPlan, Piece, PlacementPlan
from hmoe_megatron.placement.ranks import as_ranks

COST = CostModel(hidden_size=4, expert_data_parallel_size=2)


def made_layer(pieces, widths, tokens=None, ranks=None, cost=COST):
    """A LayerPlan with its prediction, of pieces [(expert, lo, hi), ...] by rank."""
    pieces = tuple(tuple(Piece(*p) for p in held) for held in pieces)
    tokens = tuple(tokens or (1.0,) * len(widths))
    return LayerPlan(pieces, tuple(widths), tokens, predict(pieces, tokens, cost, ranks or as_ranks(len(pieces)), 0.0))


def random_layer(rng, widths, ranks, multiple=1, cut_share=0.5, cost=COST):
    """Pieces of each expert on random ranks, some of which may get none; cuts at multiples of `multiple`."""
    held = [[] for _ in ranks]
    for e, F in enumerate(widths):
        most = min(len(ranks), -(-F // multiple))
        pieces = rng.randint(1, min(most, 4)) if rng.random() < cut_share else 1
        cuts = sorted(rng.sample(range(multiple, F, multiple), pieces - 1))
        for rank, (lo, hi) in zip(rng.sample(range(len(ranks)), pieces), pairwise((0, *cuts, F)), strict=True):
            held[rank].append((e, lo, hi))
    return made_layer(held, widths, [rng.choice([0.0, 300 * rng.random()]) for _ in widths], ranks, cost)


def random_widths(rng, most_experts=20, most_layers=4):
    return [
        [rng.randint(1, 60) for _ in range(rng.randint(1, most_experts))] for _ in range(rng.randint(1, most_layers))
    ]


def random_plan(rng, widths_LE, ranks, **options):
    ranks = as_ranks(ranks)
    return PlacementPlan(tuple(random_layer(rng, widths, ranks, **options) for widths in widths_LE))


def owners(plan):
    """owners(plan)[layer][expert]: rank of each width unit."""
    found = [[np.full(F, -1) for F in layer.widths] for layer in plan.layers]
    for layer_owners, layer in zip(found, plan.layers, strict=True):
        for rank, held in enumerate(layer.pieces):
            for p in held:
                layer_owners[p.expert][p.lo : p.hi] = rank
    return found


@pytest.mark.parametrize("seed", range(150))
def test_applied_to_the_old_plan_they_give_the_new(seed):
    rng = random.Random(seed)
    widths, multiple = random_widths(rng), rng.choice([1, 1, 4])
    old, new = (random_plan(rng, widths, rng.randint(1, 12), multiple=multiple) for _ in range(2))
    moves, held, wanted = diff(old, new), owners(old), owners(new)
    touched = [[np.zeros(F, dtype=int) for F in layer] for layer in widths]
    for move in moves:
        units = slice(move.lo, move.hi)
        assert 0 <= move.lo < move.hi <= widths[move.layer][move.expert]
        assert move.source != move.to and (held[move.layer][move.expert][units] == move.source).all()
        held[move.layer][move.expert][units] = move.to
        touched[move.layer][move.expert][units] += 1
    changed = [
        [(a != b).astype(int) for a, b in zip(*layers, strict=True)] for layers in zip(owners(old), wanted, strict=True)
    ]
    for found, right in ((held, wanted), (touched, changed)):
        assert all(
            np.array_equal(a, b) for layers in zip(found, right, strict=True) for a, b in zip(*layers, strict=True)
        )
    assert moves == sorted(moves) == diff(old, new)
    assert not any(
        (a.layer, a.expert, a.hi, a.source, a.to) == (b.layer, b.expert, b.lo, b.source, b.to)
        for a, b in pairwise(moves)
    )
    assert diff(old, old) == diff(new, new) == []


def test_what_moves_and_what_stays():
    old = PlacementPlan((made_layer([[(0, 0, 8), (1, 0, 2)], [(1, 2, 6)], []], (8, 6)),))
    new = PlacementPlan((made_layer([[(1, 0, 3)], [(0, 3, 8), (1, 3, 6)], [(0, 0, 3)]], (8, 6)),))
    assert diff(old, new) == [
        Move(layer=0, expert=0, lo=0, hi=3, source=0, to=2),
        Move(layer=0, expert=0, lo=3, hi=8, source=0, to=1),
        Move(layer=0, expert=1, lo=2, hi=3, source=1, to=0),
    ]


def test_other_ep_sizes():
    small = PlacementPlan((made_layer([[(0, 0, 4)], [(1, 0, 4)]], (4, 4)),))
    large = PlacementPlan((made_layer([[(0, 0, 4)], [], [], [(1, 0, 4)]], (4, 4)),))
    assert diff(small, large) == [Move(0, 1, 0, 4, source=1, to=3)]
    assert diff(large, small) == [Move(0, 1, 0, 4, source=3, to=1)]


def test_plans_of_other_models_are_refused():
    one, two, wide = made_layer([[(0, 0, 4)]], (4,)), made_layer([[(0, 0, 5)]], (5,)), made_layer([[(0, 0, 9)]], (9,))
    plan = PlacementPlan((one, two, two))
    with pytest.raises(ValueError, match="3 MoE layers in the old plan, 1 in the new"):
        diff(plan, PlacementPlan((one,)))
    with pytest.raises(ValueError, match=r"in layers 1-2: in layer 1 the old plan has \(5,\), the new \(9,\)"):
        diff(plan, PlacementPlan((one, wide, wide)))
    with pytest.raises(ValueError, match=r"stages \(0, 0, 0\) .* old plan, \(0, 1, 1\) in the new"):
        diff(plan, replace(plan, stages=(0, 1, 1)))


@pytest.mark.parametrize("copies", [1, 2, 4])  # powers of two: bytes are whole, sums exact
def test_bytes_of_moves(copies):
    rng, cost = random.Random(copies), CostModel(hidden_size=7, expert_data_parallel_size=copies)
    widths = [[rng.randint(1, 60) for _ in range(6)] for _ in range(3)]
    old, new = (replace(random_plan(rng, widths, ranks), cost=cost) for ranks in (4, 5))
    moves = diff(old, new)
    (state,), gradient = cost.memory([0.0])[1], 4 * 3 * 7
    unit = state - gradient  # gradients are held, but not sent
    assert moved_bytes(moves, cost) == unit * sum(move.hi - move.lo for move in moves) > 0
    assert moved_bytes([], cost) == 0
