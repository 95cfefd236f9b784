"""What planning is compared with: EPLB's packing by hand, and the table of outcomes."""

import pytest

from hmoe_megatron.placement import CostModel, Rank, contiguous_plan, plan_model
from hmoe_megatron.placement.baselines import CONTIGUOUS, EPLB_TOKENS, EPLB_WORK, WHOLE, baselines, equal_counts
from hmoe_megatron.tools.plan_tool.compare import MAX_LAYERS, comparison_table, layers_table, outcomes


@pytest.mark.parametrize(
    "weights, ranks, owners",
    [
        ([5, 4, 3, 1], 2, [0, 1, 1, 0]),
        ([9, 1, 1, 1], 2, [0, 1, 1, 0]),  # the heaviest rank must take the last: the other is full
        ([1, 2, 3, 4, 5], 2, [0, 0, 1, 1, 0]),  # 5 | 4, 3 | 2, 1: the last of two equal ones to the first
        ([9, 8, 1, 1, 1], 2, [0, 1, 1, 0, 1]),  # three places on each
        ([2, 2, 2], 3, [0, 1, 2]),
        ([1, 1], 4, [0, 1]),
    ],
)
def test_equal_counts(weights, ranks, owners):
    assert equal_counts(weights, ranks) == owners


def test_each_baseline_is_fed_with_its_own():
    """Four experts on two ranks, of work 8, 100, 60 and 100."""
    tokens, widths = [8.0, 1.0, 6.0, 5.0], [1, 100, 10, 20]
    plan = plan_model([tokens], [widths], 2)
    experts = {
        name: [[p.expert for p in rank] for rank in other.layers[0].pieces] for name, other in baselines(plan).items()
    }
    assert experts[CONTIGUOUS] == [[0, 1], [2, 3]]
    assert experts[EPLB_TOKENS] == [[0, 1], [2, 3]]  # 8 | 6, 5 | 1 where there is a place
    assert experts[EPLB_WORK] == [[1, 2], [0, 3]]  # 100 | 100 | 60 | 8
    assert plan.layers[0].cuts and list(experts) == [CONTIGUOUS, EPLB_TOKENS, EPLB_WORK, WHOLE]
    assert all(other.layers[0].tokens == tuple(tokens) for other in baselines(plan).values())
    assert WHOLE not in baselines(plan_model([[1.0, 1.0]], [[5, 5]], 2))


def test_outcomes():
    widths_LE, tokens_LE = [[10, 30], [20, 20]], [[1.0, 1.0], [1.0, 1.0]]
    cost, cap = CostModel(hidden_size=4), 3 * 50 * 4 * 18 + 1
    ranks = [Rank(bytes=cap)] * 2
    plans = {
        "contiguous": contiguous_plan(widths_LE, ranks, tokens_LE, cost),
        "planned": plan_model(tokens_LE, widths_LE, 2, cost),
    }
    found = outcomes(plans)
    assert found["contiguous"].time == 18 * 4 * 50 and found["planned"].time == 18 * 4 * 40
    assert found["contiguous"].over_mean == pytest.approx(50 / 40) and found["planned"].over_mean == 1
    assert found["contiguous"].gap == pytest.approx(0.25) and found["planned"].gap == 0
    assert found["contiguous"].cuts == 0 and found["planned"].cuts == 1
    held = plans["contiguous"].held_bytes()
    assert found["contiguous"].most_bytes == max(held.values()) > min(held.values())
    assert found["contiguous"].over_cap and not found["planned"].over_cap
    lines = comparison_table(plans).splitlines()
    assert lines[1].startswith("contiguous") and lines[1].endswith(" over cap") and "25.00%" in lines[1]
    assert max(map(len, lines)) <= 100


def test_the_least_bound_holds_for_all():
    """An old plan that is cut, beside a new one that may not be: its gap is to what cuts can reach."""
    plans = {"old": plan_model(None, [[10, 30]], 2), "planned": plan_model(None, [[10, 30]], 2, max_cuts=0)}
    assert outcomes(plans)["old"].gap == 0 and outcomes(plans)["planned"].gap == pytest.approx(0.5)


@pytest.mark.parametrize("layers", [2, MAX_LAYERS, MAX_LAYERS + 5])
def test_by_layer(layers):
    plans = {"contiguous": contiguous_plan([[10, 30]] * layers, 2), "planned": plan_model(None, [[10, 30]] * layers, 2)}
    lines = layers_table(plans).splitlines()
    assert lines[1:4] == ["  1 contiguous", "  2 planned", f"{'layer':>7}{1:>10}{2:>10}"]
    assert lines[4].split() == ["0", "1.5000", "1.0000"] and lines[-1].split()[0] == str(layers - 1)
    assert len(lines) == 4 + min(layers, MAX_LAYERS + 1)
    assert ("(5 layers more)" in layers_table(plans)) == (layers > MAX_LAYERS)
