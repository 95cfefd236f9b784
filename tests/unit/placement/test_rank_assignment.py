"""Names of ranks: bytes even over layers, few moves from an old plan; brute force over all names as the oracle."""

import random
from dataclasses import replace
from itertools import permutations

import numpy as np
import pytest

from hmoe_megatron.placement.cost import predict
from hmoe_megatron.placement.moves import diff
from hmoe_megatron.placement.plan import Piece, PlacementPlan
from hmoe_megatron.placement.rank_assignment import LEAST_GAIN, even_bytes, relabel
from hmoe_megatron.placement.ranks import Rank, as_ranks, kinds
from tests.unit.placement.test_moves import COST, made_layer, random_layer, random_widths

# What renaming and layout in turns leave in place, of what the best names and layout together would, over many plans
# with every expert in up to four pieces; measured 0.998. One plan in 40 misses the best.
JOINT_SHARE = 0.995
# Of what the nearest names would save, what is saved where they break a cap that leaves no slack; measured 0.6.
CAPPED_SHARE = 0.5


def random_ranks(rng, most):
    """Ranks of up to three kinds, without caps."""
    return tuple(Rank(speed=rng.choice([1.0, 1.0, 0.5, 2.0])) for _ in range(rng.randint(1, most)))


def renamings(ranks):
    """Every order of ranks in which each is of the kind whose place it takes."""
    kind_R = kinds(ranks)
    return [row_R for row_R in permutations(range(len(ranks))) if [kind_R[row] for row in row_R] == kind_R]


def moved(old, new):
    return sum(move.width for move in diff(PlacementPlan(tuple(old)), PlacementPlan(tuple(new))))


def sums(layers):
    return np.sum([layer.predicted.bytes for layer in layers], axis=0)


def renamed(layer, row_R):
    return tuple(layer.pieces[row] for row in row_R)


def with_names(layer, row_R, ranks):
    return made_layer(
        [[(p.expert, p.lo, p.hi) for p in held] for held in renamed(layer, row_R)], layer.widths, layer.tokens, ranks
    )


def by_kind(values, ranks):
    return [
        sorted(value for value, kind in zip(values, kinds(ranks), strict=True) if kind == wanted)
        for wanted in range(max(kinds(ranks)) + 1)
    ]


def assert_only_names_differ(made, layers, ranks, widths_only=False):
    """The same pieces, or with widths_only pieces of the same widths, under other names, and what is predicted."""

    def contents(layer):
        return [sorted((p.expert, p.width if widths_only else (p.lo, p.hi)) for p in held) for held in layer.pieces]

    assert len(made) == len(layers)
    for new, given in zip(made, layers, strict=True):
        assert by_kind(contents(new), ranks) == by_kind(contents(given), ranks)
        assert (new.widths, new.tokens) == (given.widths, given.tokens)
        assert new.predicted == predict(new.pieces, new.tokens, COST, ranks, given.predicted.bound)
        assert by_kind(new.predicted.time, ranks) == by_kind(given.predicted.time, ranks)


@pytest.mark.parametrize("seed", range(100))
def test_even_bytes_renames_and_no_more(seed):
    rng = random.Random(seed)
    ranks, widths = random_ranks(rng, 12), random_widths(rng, most_layers=8)
    layers = [random_layer(rng, w, ranks) for w in widths]
    stages = [rng.randrange(2) for _ in layers]
    made = even_bytes(layers, ranks, stages)
    assert_only_names_differ(made, layers, ranks)
    assert made == even_bytes(layers, ranks, stages)
    for stage in set(stages):
        members = [n for n in range(len(layers)) if stages[n] == stage]
        before, after = ([plans[n] for n in members] for plans in (layers, made))
        assert even_bytes(before, ranks) == tuple(after)
        for fullest, was in zip(by_kind(sums(after), ranks), by_kind(sums(before), ranks), strict=True):
            assert fullest[-1] <= was[-1]


@pytest.mark.parametrize("layers, ranks, most_over_mean", [(12, 8, 1.02), (24, 64, 1.001), (60, 16, 1.001)])
def test_even_bytes_comes_near_the_mean(layers, ranks, most_over_mean):
    """The mean is a bound; a random naming of many is beaten every time."""
    for seed in range(10):
        rng = random.Random(seed)
        widths = [[round(rng.lognormvariate(6, 0.5)) for _ in range(4 * ranks)] for _ in range(layers)]
        given = [random_layer(rng, w, as_ranks(ranks), cut_share=0.2) for w in widths]
        fullest = sums(even_bytes(given, as_ranks(ranks))).max()
        assert fullest <= most_over_mean * sums(given).mean()
        shuffled = np.random.default_rng(seed)
        for _ in range(20):
            assert fullest < np.sum([shuffled.permutation(layer.predicted.bytes) for layer in given], axis=0).max()


@pytest.mark.parametrize("seed", range(60))
def test_even_bytes_of_two_layers_is_the_best(seed):
    rng = random.Random(seed)
    ranks = random_ranks(rng, 6)
    first, second = (random_layer(rng, w, ranks) for w in ([rng.randint(1, 60) for _ in range(9)] for _ in range(2)))
    total = sum(sums([first, second]))
    for fullest, best in zip(
        by_kind(sums(even_bytes([first, second], ranks)), ranks),
        np.min(
            [
                [
                    max(kind)
                    for kind in by_kind(
                        np.array(first.predicted.bytes) + np.array(second.predicted.bytes)[list(row_R)], ranks
                    )
                ]
                for row_R in renamings(ranks)
            ],
            axis=0,
        ),
        strict=True,
    ):
        assert best <= fullest[-1] <= best + LEAST_GAIN * total


def test_even_bytes_leaves_what_is_even():
    """Equal experts stay in Megatron's order; so do layers that are no better renamed, or hardly."""
    equal = [made_layer([[(2 * r, 0, 64), (2 * r + 1, 0, 64)] for r in range(8)], [64] * 16) for _ in range(6)]
    assert even_bytes(equal, as_ranks(8)) == tuple(equal)
    one = [made_layer([[(0, 0, 5)], [(1, 0, 9)]], [5, 9])]
    assert even_bytes(one, as_ranks(2)) == tuple(one)
    hardly = [made_layer([[(0, 0, 10_000)], [(1, 0, 10_001)]], [10_000, 10_001])] * 2
    assert even_bytes(hardly, as_ranks(2)) == tuple(hardly)
    cap = max(sums(hardly)) - 1
    assert max(sums(even_bytes(hardly, (Rank(bytes=cap),) * 2))) <= cap


@pytest.mark.parametrize("seed", range(20))
def test_even_bytes_renames_few(seed):
    """The layer that differs most among ranks stays; in the others, every rank that keeps its bytes."""
    rng = random.Random(seed)
    layers = []
    for _ in range(6):
        widths = [rng.choice([30, 30, 30, 60, 90]) for _ in range(8)]
        layers.append(made_layer([[(e, 0, F)] for e, F in enumerate(widths)], widths))
    made = even_bytes(layers, as_ranks(8))
    assert max(sums(made)) < max(sums(layers))
    widest = max(range(6), key=lambda n: (np.ptp(layers[n].predicted.bytes), -n))
    assert made[widest] == layers[widest]
    for new, given in zip(made, layers, strict=True):
        for rank in range(8):
            assert (new.pieces[rank] == given.pieces[rank]) == (
                new.predicted.bytes[rank] == given.predicted.bytes[rank]
            )


@pytest.mark.parametrize("seed", range(150))
def test_relabel_moves_the_fewest_of_all_names(seed):
    """Exact where an expert is cut in one of the plans at most: then its layout makes no difference."""
    rng = random.Random(seed)
    ranks, widths, multiple = random_ranks(rng, 6), random_widths(rng), rng.choice([1, 4])
    cut_old = rng.choice([0, 1])
    old, layers = (
        [random_layer(rng, w, ranks, multiple, cut_share) for w in widths] for cut_share in (cut_old, 1 - cut_old)
    )
    made = relabel(layers, old, ranks, cut_multiple=multiple)
    assert_only_names_differ(made, layers, ranks, widths_only=True)
    for new, was, given in zip(made, old, layers, strict=True):
        assert moved([was], [new]) == min(
            moved([was], [replace(given, pieces=renamed(given, row_R))]) for row_R in renamings(ranks)
        )


def most_in_place(layer, row_R, old, multiple):
    """Of the layer renamed by row_R, with the pieces of each expert in the best order that keeps cuts at multiples."""
    was, most = {(p.expert, rank): p for rank, held in enumerate(old.pieces) for p in held}, 0
    for e in range(len(layer.widths)):
        pieces = [(rank, p.width) for rank, row in enumerate(row_R) for p in layer.pieces[row] if p.expert == e]
        in_place = []
        for order in permutations(pieces):
            if not any(width % multiple for _, width in order[:-1]):
                ends = np.cumsum([width for _, width in order])
                in_place.append(
                    sum(
                        max(0, min(end, was[e, rank].hi) - max(end - width, was[e, rank].lo))
                        for (rank, width), end in zip(order, ends, strict=True)
                        if (e, rank) in was
                    )
                )
        most += max(in_place)
    return most


def test_relabel_with_cuts_comes_near_the_best_names_and_layout():
    in_place = best_in_place = 0
    for seed in range(60):
        rng = random.Random(seed)
        ranks, multiple = as_ranks(rng.randint(2, 4)), rng.choice([1, 4])
        widths = [rng.randint(8, 40) for _ in range(rng.randint(1, 3))]
        old, given = (random_layer(rng, widths, ranks, multiple, cut_share=1) for _ in range(2))
        best = max(most_in_place(given, row_R, old, multiple) for row_R in renamings(ranks))
        found = sum(widths) - moved([old], relabel([given], [old], ranks, (), multiple))
        assert sum(widths) - moved([old], [given]) <= found <= best
        in_place, best_in_place = in_place + found, best_in_place + best
    assert in_place >= JOINT_SHARE * best_in_place


@pytest.mark.parametrize("seed", range(100))
def test_relabel_keeps_widths_cuts_times_and_caps(seed):
    rng = random.Random(seed)
    widths, multiple, slack = random_widths(rng), rng.choice([1, 4, 16]), rng.choice([1, 1, 1.05, 1.3])
    ranks = random_ranks(rng, 12)
    old, layers = ([random_layer(rng, w, ranks, multiple, cost=COST) for w in widths] for _ in range(2))
    stages = [rng.randrange(2) for _ in layers]
    cap = round(
        slack * max(sums([p for p, s in zip(layers, stages, strict=True) if s == stage]).max() for stage in set(stages))
    )
    capped = tuple(replace(rank, bytes=cap) for rank in ranks)
    made = relabel(layers, old, capped, stages, multiple)
    assert_only_names_differ(made, layers, ranks, widths_only=True)
    assert made == relabel(layers, old, capped, stages, multiple)
    assert not any(p.lo % multiple for layer in made for held in layer.pieces for p in held)
    for stage in set(stages):
        before, given, after = (
            [p for p, s in zip(plans, stages, strict=True) if s == stage] for plans in (old, layers, made)
        )
        assert sums(after).max() <= cap
        assert moved(before, after) <= moved(before, given)
        assert relabel(given, before, capped, (), multiple) == tuple(after)


def near(rng, layer, ranks):
    """The layer with some pieces on other ranks."""
    held = [{p.expert: p for p in pieces} for pieces in layer.pieces]
    for _ in range(rng.randint(1, 3)):
        source, to = rng.choices(range(len(ranks)), k=2)
        for e in [e for e in held[source] if e not in held[to] and rng.random() < 0.4]:
            held[to][e] = held[source].pop(e)
    return made_layer(
        [[(p.expert, p.lo, p.hi) for p in pieces.values()] for pieces in held], layer.widths, layer.tokens, ranks
    )


@pytest.mark.parametrize("alike", [False, True])
def test_relabel_under_caps_without_slack(alike):
    """Caps at what the fullest ranks hold. alike: all layers far from the old ones by one renaming."""
    saved = could_save = 0
    for seed in range(200):
        rng = random.Random(seed)
        ranks, widths = random_ranks(rng, 8), random_widths(rng, 10, 5)
        old = [random_layer(rng, w, ranks) for w in widths]
        layers = [near(rng, p, ranks) if rng.random() < 0.5 else random_layer(rng, p.widths, ranks) for p in old]
        if alike and len(ranks) < 7:
            row_R = rng.choice(renamings(ranks))
            layers = [with_names(p, row_R, ranks) for p in layers]
        fullest = [of_kind[-1] for of_kind in by_kind(sums(layers), ranks)]
        capped = tuple(replace(rank, bytes=int(fullest[kind])) for rank, kind in zip(ranks, kinds(ranks), strict=True))
        made, free = (relabel(layers, old, r) for r in (capped, ranks))
        assert all(held <= rank.bytes for held, rank in zip(sums(made), capped, strict=True))
        assert max(moved(old, made), moved(old, free)) <= moved(old, layers)
        if all(held <= rank.bytes for held, rank in zip(sums(free), capped, strict=True)):
            assert made == free
        else:
            saved += moved(old, layers) - moved(old, made)
            could_save += moved(old, layers) - moved(old, free)
    print("SH", saved / could_save)
    assert saved >= CAPPED_SHARE * could_save > 0


@pytest.mark.parametrize("seed", range(40))
def test_relabel_undoes_a_renaming(seed):
    rng = random.Random(seed)
    ranks, widths = random_ranks(rng, 12), random_widths(rng)
    old = [random_layer(rng, w, ranks, cut_share=0) for w in widths]
    assert relabel(old, old, ranks) == tuple(old)
    row_R = rng.choice(renamings(ranks)) if len(ranks) < 7 else range(len(ranks))
    shuffled = [with_names(layer, row_R, ranks) for layer in old]
    assert [layer.pieces for layer in relabel(shuffled, old, ranks)] == [layer.pieces for layer in old]


def test_a_plan_like_the_old_one_stays_as_it_is():
    """Cuts and the order of pieces on a rank too."""
    rng = random.Random(0)
    layers = [random_layer(rng, [40] * 9, as_ranks(5)) for _ in range(5)]
    layers = [replace(layer, pieces=tuple(held[::-1] for held in layer.pieces)) for layer in layers]
    assert relabel(layers, layers, as_ranks(5)) == tuple(layers)


def test_an_expert_in_many_pieces_finds_its_place():
    """Other names and another layout of the same pieces, of different widths: nothing moves."""
    rng, ends = random.Random(0), np.cumsum([0, *range(10, 130, 10), 5]).tolist()
    old = made_layer([[(0, lo, hi)] for lo, hi in zip(ends, ends[1:], strict=False)], [ends[-1]])
    for _ in range(20):
        *widths, last = [p.width for held in old.pieces for p in held]
        rng.shuffle(widths)
        ends = np.cumsum([0, *widths, last]).tolist()
        given = made_layer(rng.sample([[(0, lo, hi)] for lo, hi in zip(ends, ends[1:], strict=False)], 13), [ends[-1]])
        assert relabel([given], [old], as_ranks(13), cut_multiple=10)[0].pieces == old.pieces


def test_pieces_are_laid_over_the_old_ones():
    """The first shrinks in its place, the new one comes after it, and the width that is no multiple stays last."""
    ranks = tuple(Rank(speed=speed) for speed in (1.0, 2.0, 4.0))  # names are fixed
    old = made_layer([[(0, 0, 50)], [(0, 50, 101)], []], [101])
    new = made_layer([[(0, 40, 70)], [(0, 70, 101)], [(0, 0, 40)]], [101])
    (made,) = relabel([new], [old], ranks, cut_multiple=10)
    assert made.pieces == ((Piece(0, 0, 30),), (Piece(0, 70, 101),), (Piece(0, 30, 70),))


@pytest.mark.parametrize("old_ranks, new_ranks", [(2, 5), (5, 2), (1, 4), (4, 1), (3, 4)])
def test_other_ep_sizes(old_ranks, new_ranks):
    for seed in range(10):
        rng = random.Random(seed)
        widths = [rng.randint(1, 60) for _ in range(8)]
        old, given = (random_layer(rng, widths, as_ranks(n), cut_share=0) for n in (old_ranks, new_ranks))
        made = relabel([given], [old], as_ranks(new_ranks))
        assert moved([old], made) == min(
            moved([old], [replace(given, pieces=renamed(given, row_R))]) for row_R in renamings(as_ranks(new_ranks))
        )


def test_a_tight_cap_costs_few_moves():
    """Names of a stage that fit are found though the nearest names of each layer together would not fit."""
    rng, ranks = random.Random(0), as_ranks(16)
    widths = [[rng.randint(500, 3000) for _ in range(64)] for _ in range(12)]
    old, new = (even_bytes([random_layer(rng, w, ranks, cut_share=0.1) for w in widths], ranks) for _ in range(2))
    cap = round(1.02 * sums(new).max())
    free = relabel(new, old, ranks)
    assert sums(free).max() > cap
    made = relabel(new, old, (Rank(bytes=cap),) * 16)
    assert sums(made).max() <= cap
    assert moved(old, free) < moved(old, made) < (moved(old, free) + moved(old, new)) / 2


def test_what_relabel_refuses():
    layer = made_layer([[(0, 0, 6)], [(0, 6, 10)]], [10])
    with pytest.raises(ValueError, match="cut_multiple .* 4: expert 0 of layer 0 is cut at 6"):
        relabel([layer], [layer], as_ranks(2), cut_multiple=4)
    with pytest.raises(ValueError, match="1 MoE layers in the old plan, 2 in the new"):
        relabel([layer, layer], [layer], as_ranks(2))
    with pytest.raises(ValueError, match="other widths"):
        relabel([layer], [made_layer([[(0, 0, 9)], []], [9])], as_ranks(2))
