"""Lower bounds with values counted by hand: a bound that is merely low would prove nothing."""

from dataclasses import replace

import pytest

from hmoe_megatron.placement import CostModel, Profile, Rank, plan_layer
from hmoe_megatron.placement.bound import lower_bound
from hmoe_megatron.placement.problem import LayerProblem
from hmoe_megatron.placement.ranks import as_ranks

# One row of width w takes 18 w; a piece of any width takes LAUNCH besides.
LAUNCH = 1000.0
LAUNCHED = CostModel(Profile("launched", flops_per_s=1.0, launch_s=LAUNCH))


def bound(widths, ranks, cost=None, max_cuts=None, unit=1, tokens=None):
    ranks, cost = as_ranks(ranks), cost or CostModel()
    max_cuts = len(ranks) - 1 if max_cuts is None else max_cuts
    problem = LayerProblem.of(tokens or [1.0] * len(widths), widths, ranks, cost, max_cuts, unit)
    return lower_bound(problem, whole=not max_cuts)


@pytest.mark.parametrize(
    "widths, ranks, expected",
    [
        ([10] * 3, 2, 20),  # one rank holds two
        ([10] * 5, 2, 30),
        ([9, 8, 7, 1], 3, 9),  # the widest
        ([9, 8, 7, 6], 3, 13),  # of the four one rank holds two: at least the narrowest two
        ([9, 8, 7, 6, 5, 4, 4], 3, 43 / 3),  # three on a rank: 4 + 4 + 5 is below the even share
        ([9, 9, 9, 9, 9, 9, 9], 3, 27),
    ],
)
def test_whole_experts(widths, ranks, expected):
    assert bound(widths, ranks, max_cuts=0) == pytest.approx(18 * expected)


def test_cuts_that_cost_nothing_reach_the_even_share():
    assert bound([10, 30], 4) == pytest.approx(18 * 40 / 4)
    assert bound([10, 30], [Rank(speed=3.0), Rank(speed=1.0)]) == pytest.approx(18 * 40 / 4)


def test_an_expert_that_must_be_cut_pays_for_each_piece():
    """600 wide on three ranks: a launch each, and 200 of the width."""
    assert bound([600], 3, LAUNCHED) == pytest.approx(LAUNCH + 18 * 200, rel=1e-5)
    # Fit on two of the three: half of it and one launch would do; with all three it is as above.
    assert bound([600], 2, LAUNCHED) == pytest.approx(LAUNCH + 18 * 300, rel=1e-5)


def test_more_pieces_than_ranks_do_not_fit():
    """At units of 100, 250 is cut into 100, 100 and 50; on two ranks one holds 150 at the least: 200 with its unit."""
    assert bound([250], 3, LAUNCHED, unit=100) == pytest.approx(LAUNCH + 18 * 100, rel=1e-5)
    assert bound([250], 2, LAUNCHED, unit=100) == pytest.approx(LAUNCH + 18 * 150, rel=1e-5)
    assert bound([300], 2, LAUNCHED, unit=100) == pytest.approx(LAUNCH + 18 * 200, rel=1e-5)


def test_tiles():
    """Widths count in whole tiles of 64: a unit of 1 does not help below a tile."""
    tiled = CostModel(Profile("tiled", flops_per_s=1.0, launch_s=LAUNCH, width_tile=64))
    assert bound([128], 2, tiled) == pytest.approx(LAUNCH + 18 * 64, rel=1e-5)
    assert bound([128], 4, tiled) == pytest.approx(LAUNCH + 18 * 64, rel=1e-5)
    assert bound([65], 1, tiled) == pytest.approx(LAUNCH + 18 * 128, rel=1e-5)


@pytest.mark.parametrize(
    "widths, ranks, cost, unit",
    [([600], 3, LAUNCHED, 1), ([250], 2, LAUNCHED, 50), ([300], 2, LAUNCHED, 100), ([64] * 4, 2, LAUNCHED, 16)],
)
def test_the_planner_reaches_it(widths, ranks, cost, unit):
    plan = plan_layer(None, widths, ranks, cost, cut_multiple=unit)
    assert plan.predicted.gap < 1e-4


def test_it_is_of_the_fastest_kind_of_rank():
    problem = LayerProblem.of([1.0], [100], [Rank(speed=0.5), Rank(speed=2.0)], CostModel(), 0, 1)
    assert lower_bound(problem, whole=True) == pytest.approx(18 * 100 / 2)
    assert lower_bound(replace(problem, max_cuts=1)) == pytest.approx(18 * 100 / 2.5)
