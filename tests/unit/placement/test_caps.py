"""Caps on bytes: never broken, kept wherever HiGHS keeps them, and said plainly where they can't be."""

import re
from collections import Counter

import numpy as np
import pytest

from benchmarks.cases import under_caps
from hmoe_megatron.placement import (
    CostModel,
    InfeasiblePlan,
    Rank,
    contiguous_plan,
    nodes_of,
    plan_layer,
    solver,
    validate_pieces,
)
from tests.rows import mostly_rarely, rarely

CHUNK = 200
COST = CostModel(hidden_size=64)


@pytest.mark.parametrize("first, layers", [(0, 24), *rarely(*((first, CHUNK) for first in range(0, 2000, CHUNK)))])
def test_no_cap_is_broken_and_none_that_can_be_kept_is_given_up(first, layers):
    """Layers whose caps some placement keeps: 2,000 in the campaign, 100,000 by `make bench-planner`."""
    found = Counter(map(under_caps, range(first, first + layers)))
    assert found["broken"] == found["missed"] == 0 and found["kept"] >= 0.98 * layers


def test_caps_move_what_time_alone_would_not():
    widths, tokens = [100] * 6, [60, 10, 10, 10, 10, 10]
    free = plan_layer(tokens, widths, 2, COST, max_cuts=0)
    assert sorted(map(len, free.pieces)) == [1, 5]
    four_experts = 4 * max(plan_layer([60], [100], 1, COST).predicted.bytes)
    capped = plan_layer(tokens, widths, [Rank(bytes=four_experts)] * 2, COST, max_cuts=0)
    assert sorted(map(len, capped.pieces)) == [2, 4]
    assert max(free.predicted.time) < max(capped.predicted.time)


def test_a_cap_of_none_is_no_cap_and_a_large_one_changes_nothing():
    widths, tokens = [100, 200, 300, 50], [5.0, 1.0, 2.0, 8.0]
    free = plan_layer(tokens, widths, 2, COST)
    assert free == plan_layer(tokens, widths, nodes_of(1, 2, bytes=10**12), COST)


def test_an_infeasible_layer_names_ranks_missing_bytes_and_remedies():
    with pytest.raises(InfeasiblePlan) as error:
        plan_layer(None, [100, 100, 100], [Rank(bytes=500_000)] * 2, COST, max_cuts=0)
    text = str(error.value)
    need = 3 * plan_layer([1], [100], 1, COST).predicted.bytes[0]
    assert f"experts of {need:,} bytes do not fit" in text and "1,000,000 bytes in all" in text
    missing = [int(n.replace(",", "")) for n in re.findall(r"rank \d lacks ([\d,]+\d)", text)]
    assert missing and sum(missing) >= need - 1_000_000
    assert "were not made" not in text
    for remedy in ("more cuts than 0 (--hmoe-max-cuts)", "more ranks", "smaller micro-batch", "higher caps"):
        assert remedy in text


def test_many_ranks_that_lack_the_same_are_said_in_one():
    need = plan_layer([1], [1024], 1, CostModel(hidden_size=4096)).predicted.bytes[0]
    ranks = [Rank(bytes=need // 2)] * 16
    with pytest.raises(InfeasiblePlan) as error:
        plan_layer(None, [1024] * 16, ranks, CostModel(hidden_size=4096), max_cuts=0)
    assert f"each of the 16 ranks lacks {(need - need // 2) / 2**30:.2f} GiB" in str(error.value)
    assert "rank 0 lacks" not in str(error.value)


def test_cuts_use_room_that_whole_experts_cannot():
    need = plan_layer([1, 1, 1], [100] * 3, 1, COST).predicted.bytes[0]
    ranks = [Rank(bytes=int(need / 2 * 1.05))] * 2
    with pytest.raises(InfeasiblePlan, match="do not fit"):
        plan_layer(None, [100] * 3, ranks, COST, max_cuts=0)
    plan = plan_layer(None, [100] * 3, ranks, COST)
    assert plan.cuts == 1 and max(plan.predicted.bytes) <= ranks[0].bytes


@pytest.mark.parametrize("seed", mostly_rarely(range(100), range(4)))
def test_caps_on_some_ranks_only(seed):
    """A rank without a cap takes what the others have no room for."""
    rng = np.random.default_rng(seed)
    widths, tokens = rng.integers(1, 900, 9).tolist(), rng.lognormal(3, 1, 9).tolist()
    free = plan_layer(tokens, widths, 4, COST)
    ranks = [Rank(bytes=held // 2 if r % 2 else None) for r, held in enumerate(free.predicted.bytes)]
    plan = plan_layer(tokens, widths, ranks, COST, cut_multiple=16)
    assert all(b <= (rank.bytes or b) for b, rank in zip(plan.predicted.bytes, ranks, strict=True))
    assert validate_pieces(plan.pieces, widths) == []


def test_one_expert_is_more_than_the_capped_rank_holds():
    plan = plan_layer([7], [6], [Rank(bytes=6200), Rank()], COST)
    assert plan.predicted.bytes[0] <= 6200 and validate_pieces(plan.pieces, (6,)) == []


def test_cuts_never_cost_what_whole_experts_do_not():
    """The fewest-rows expert, idle and free to cut, must not lead to a slower plan than none cut."""
    arguments = [0, 43, 22, 0], [48, 57, 18, 32], [Rank(bytes=388_594), Rank(bytes=184_424)], COST
    whole = plan_layer(*arguments, max_cuts=0)
    assert max(plan_layer(*arguments).predicted.time) <= max(whole.predicted.time)
    assert whole.pieces == contiguous_plan([arguments[1]], 2).layers[0].pieces


@pytest.mark.parametrize("seed", mostly_rarely(range(40), range(2)))
def test_contiguous_placement_that_fits_is_never_given_up_nor_beaten(seed):
    rng = np.random.default_rng(seed)
    widths, tokens = rng.integers(1, 900, 12).tolist(), rng.lognormal(3, 1, 12).tolist()
    in_order = contiguous_plan([widths], 4, [tokens], COST).layers[0]
    ranks = [Rank(bytes=held) for held in in_order.predicted.bytes]
    for max_cuts in (0, 3):
        plan = plan_layer(tokens, widths, ranks, COST, max_cuts)
        assert max(plan.predicted.time) <= max(in_order.predicted.time) * (1 + 1e-9)


def test_the_same_plan_with_the_fullest_rank_where_the_cap_is_largest():
    """Caps that only the order of the ranks breaks cost no time."""
    widths, tokens = [500, 400, 30, 20], [1.0, 1.0, 20.0, 30.0]
    free = plan_layer(tokens, widths, 2, COST, max_cuts=0)
    assert len({*free.predicted.bytes}) == 2
    ranks = [Rank(bytes=held) for held in free.predicted.bytes[::-1]]
    assert sorted(plan_layer(tokens, widths, ranks, COST, max_cuts=0).predicted.time) == sorted(free.predicted.time)


def test_a_layer_too_large_for_highs_is_not_said_to_be_certain():
    widths, ranks = [100] * 600, 2
    need = plan_layer(None, widths, 1, COST).predicted.bytes[0]
    odd = need // 600 // 2  # half an expert of room is of no use without cuts
    caps = [Rank(bytes=need // 2 + odd - 1), Rank(bytes=need // 2 - odd + 20_000)]  # a piece more takes bytes too
    with pytest.raises(InfeasiblePlan, match="were not made to fit"):
        plan_layer(None, widths, caps, COST, max_cuts=0)
    assert plan_layer(None, widths, caps, COST).cuts == 1
    with pytest.raises(InfeasiblePlan) as error:
        plan_layer(None, widths, [Rank(bytes=need // 3)] * ranks, COST)
    assert "do not fit" in str(error.value) and "more cuts" not in str(error.value)


def test_an_expert_wider_than_every_cap_is_cut_without_highs(monkeypatch):
    monkeypatch.setattr(solver, "any_that_fits", lambda *_: pytest.fail("HiGHS was asked"))
    need = plan_layer([5], [3000], 1, COST).predicted.bytes[0]
    widths = [3000, *[10] * 50]
    plan = plan_layer([5.0] * 51, widths, nodes_of(1, 4, bytes=need // 2), COST, cut_multiple=16)
    assert max(plan.predicted.bytes) <= need // 2 and plan.cuts >= 2


def test_idle_experts_even_out_bytes():
    widths = [10, 20, 40, 80, 160, 320, 640, 1280]
    held = plan_layer([0] * 8, widths, 2, COST, max_cuts=0).predicted.bytes
    assert max(held) * 2 / sum(held) <= 1.005  # 1280 against 1270
