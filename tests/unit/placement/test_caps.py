"""Caps on bytes: never broken, kept wherever HiGHS keeps them, and said plainly where they can't be."""

import re
from collections import Counter

import pytest

from benchmarks.cases import under_caps
from hmoe_megatron.placement import CostModel, InfeasiblePlan, Rank, nodes_of, plan_layer

CHUNK = 200
COST = CostModel(hidden_size=64)


@pytest.mark.parametrize("first", range(0, 2000, CHUNK))
def test_no_cap_is_broken_and_none_that_can_be_kept_is_given_up(first):
    """2,000 layers whose caps some placement keeps; `make bench-planner CASES=100000` draws more."""
    found = Counter(map(under_caps, range(first, first + CHUNK)))
    assert found["broken"] == found["missed"] == 0 and found["kept"] >= 0.98 * CHUNK


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
    for remedy in ("more cuts than 0 (--hmoe-max-cuts)", "more ranks", "smaller micro-batch", "higher caps"):
        assert remedy in text


def test_cuts_use_room_that_whole_experts_cannot():
    need = plan_layer([1, 1, 1], [100] * 3, 1, COST).predicted.bytes[0]
    ranks = [Rank(bytes=int(need / 2 * 1.05))] * 2
    with pytest.raises(InfeasiblePlan, match="do not fit"):
        plan_layer(None, [100] * 3, ranks, COST, max_cuts=0)
    plan = plan_layer(None, [100] * 3, ranks, COST)
    assert plan.cuts == 1 and max(plan.predicted.bytes) <= ranks[0].bytes
