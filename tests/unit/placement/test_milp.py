"""HiGHS as the oracle: itself against every assignment, then the planner of whole experts against it."""

import ctypes
import itertools
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from benchmarks.cases import Case, capped_layer, whole_layer
from hmoe_megatron.placement import CostModel, Rank, milp
from hmoe_megatron.placement.baselines import equal_counts
from hmoe_megatron.placement.bound import lower_bound
from hmoe_megatron.placement.lpt import _fullest, improve
from hmoe_megatron.placement.milp import any_that_fits, fastest
from tests.rows import mostly_rarely, rarely

NODES = 20_000
WITHIN = 0.005


@pytest.mark.parametrize("seed", mostly_rarely(range(40), range(6)))
def test_the_oracle_against_every_assignment(seed):
    case = whole_layer(seed)
    few, ranks = slice(0, 5), case.ranks[:3]
    case = replace(case, tokens_E=case.tokens_E[few], widths_E=case.widths_E[few], ranks=ranks)
    problem = case.problem()
    everywhere = itertools.product(range(problem.ranks), repeat=len(case.widths_E))
    least = min(
        max(
            problem.times(
                [{e: case.widths_E[e] for e, r in enumerate(ranks_E) if r == rank} for rank in range(problem.ranks)]
            )
        )
        for ranks_E in everywhere
    )
    found = fastest(problem, NODES)
    assert found.proven and max(problem.times(found.held)) == pytest.approx(least, rel=1e-4)
    assert lower_bound(problem, whole=True) <= least * (1 + 1e-9)


# Only 26 needs the best of the many starts.
@pytest.mark.parametrize("seed", mostly_rarely(range(100), [*range(8), 26]))
def test_whole_experts_within_half_a_percent_of_the_optimum(seed):
    case = whole_layer(seed)
    found = fastest(case.problem(), NODES)
    assert found.proven
    assert max(case.plan().predicted.time) <= max(case.problem().times(found.held)) * (1 + WITHIN)


@pytest.mark.parametrize("seed", mostly_rarely(range(60), range(12)))
def test_moves_and_swaps_never_make_the_fullest_rank_fuller(seed):
    """By time or bytes, from an assignment dealt in turn, under caps."""
    problem = capped_layer(seed).problem()
    items, target = problem.items(problem.whole), lower_bound(problem, whole=True)
    dealt = np.arange(len(problem.widths_E)) % problem.ranks
    assert _fullest(items, improve(items, dealt, target), target) <= _fullest(items, dealt, target)


def test_as_many_cuts_as_are_allowed():
    """Three equal experts on two ranks need one."""
    case = Case([10.0] * 3, [64] * 3, [Rank()] * 2, CostModel(), max_cuts=1, cut_multiple=16)
    found = fastest(replace(case.problem(), tile=1), NODES)
    assert sum(map(len, found.held)) == 4


@pytest.mark.parametrize("seed", mostly_rarely(range(12), range(4)))
def test_cuts_never_make_the_optimum_slower_and_never_beat_the_bound(seed):
    case = replace(whole_layer(seed), cut_multiple=(1, 64)[seed % 2])
    case = replace(case, widths_E=case.widths_E[:6], tokens_E=case.tokens_E[:6], ranks=case.ranks[:3])
    whole, cut = case.problem(), replace(case, max_cuts=len(case.ranks) - 1).problem()
    cut = replace(cut, tile=1)  # the program does not round widths up to tiles
    slowest = max(cut.times(fastest(cut, NODES).held))
    assert slowest <= max(whole.times(fastest(whole, NODES).held)) * (1 + 1e-4)
    assert slowest >= lower_bound(cut) * (1 - 1e-4)


@pytest.mark.parametrize("seed", mostly_rarely(range(60), range(10)))
def test_what_fits_is_a_placement(seed):
    """Under caps that can be kept it is found, on as few pieces as max_cuts says, at cut units."""
    case = capped_layer(seed)
    if len(case.widths_E) > 16 or min(rank.bytes for rank in case.ranks) == 0:
        return
    problem = case.problem()
    found = any_that_fits(problem, NODES)
    if found.held is None:
        assert not found.proven  # one exists by construction
        return
    assert not any(problem.overflow(found.held))
    for e, width in enumerate(case.widths_E):
        assert sum(rank.get(e, 0) for rank in found.held) == width
    assert sum(map(len, found.held)) - len(case.widths_E) <= case.max_cuts
    odd = [w for rank in found.held for e, w in rank.items() if w % case.cut_multiple]
    assert len(odd) <= sum(width % case.cut_multiple > 0 for width in case.widths_E)


def test_what_can_not_fit_is_proven():
    case = whole_layer(3)
    one_byte = [replace(rank, bytes=1) for rank in case.ranks]
    found = any_that_fits(replace(case, ranks=one_byte).problem(), NODES)
    assert found.held is None and found.proven


@pytest.mark.parametrize("layers", [10, *rarely(200)])
def test_whole_experts_are_never_slower_than_by_eplbs_method(layers):
    for seed in range(layers):
        case = whole_layer(seed)
        problem, planned = case.problem(), max(case.plan().predicted.time)
        for weights_E in (case.tokens_E, [m * F for m, F in zip(case.tokens_E, case.widths_E, strict=True)]):
            owners = np.array(equal_counts(weights_E, problem.ranks))
            assert planned <= max(problem.times(problem.held(problem.whole, owners))) * (1 + 1e-9), seed


@pytest.mark.parametrize("seed", mostly_rarely(range(30), range(4)))
def test_under_caps_plans_are_near_the_fastest_and_cuts_make_none_slower(seed):
    """Random caps, which whole experts keep."""
    case = whole_layer(1000 + seed)
    case = replace(case, ranks=case.ranks[:3])
    problem = case.problem()
    owners = np.random.default_rng(seed).integers(0, problem.ranks, len(case.widths_E))
    caps = problem.held_bytes(problem.held(problem.whole, owners)) * 1.1
    case = replace(case, ranks=[replace(rank, bytes=int(cap)) for rank, cap in zip(case.ranks, caps, strict=True)])
    best = max(problem.times(fastest(case.problem(), NODES).held))
    whole = max(case.plan().predicted.time)
    assert best * (1 - 1e-4) <= whole <= best * (1 + WITHIN)
    assert max(replace(case, max_cuts=len(case.ranks) - 1).plan().predicted.time) <= whole * (1 + 1e-9)


def test_what_highs_finds_is_counted_again(monkeypatch):
    """Its tolerance may let a placement one byte over a cap pass."""
    case = whole_layer(3)
    problem = case.problem()
    held = fastest(problem, NODES).held
    caps = problem.held_bytes(held)
    caps[0] -= 1
    short = replace(problem, cap_R=caps)
    values = np.array([float(e in rank) for e in range(len(case.widths_E)) for rank in held] + [0.0])
    monkeypatch.setattr(milp, "milp", lambda **_: SimpleNamespace(x=values, status=0))
    assert any_that_fits(replace(short, cap_R=caps + 1), NODES).held == [dict(sorted(rank.items())) for rank in held]
    assert any_that_fits(short, NODES).held is None and not any_that_fits(short, NODES).proven


def test_highs_is_silent_and_python_is_not(monkeypatch, capfd):
    """What it prints would be in the tool's JSON."""
    libc = ctypes.CDLL(None)
    monkeypatch.setattr(milp, "milp", lambda **_: libc.puts(b"from C") and SimpleNamespace(x=None, status=2))
    print("before")
    any_that_fits(whole_layer(3).problem(), NODES)
    print("after")
    libc.fflush(None)
    assert capfd.readouterr().out == "before\nafter\n"
