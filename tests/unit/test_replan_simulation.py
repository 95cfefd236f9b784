"""The simulation of experts that move while training: its times, its sums, its oracle, its table."""

import math

import numpy as np
import pytest

from benchmarks.replan_simulation import Case, Result, campaign_table, simulate, step_times
from hmoe_megatron.placement import CostModel, plan_model
from hmoe_megatron.placement.profiles import profile_named
from hmoe_megatron.replan.decision import stage_time
from hmoe_megatron.replan.proposal import LEAST_GAIN

WIDTHS = tuple(range(1600, 3600, 100))
FIRST = plan_model(None, [WIDTHS], 4, cut_multiple=16)
HOT = np.where(np.isin(np.arange(len(WIDTHS)), (0, 2, 7)), 400.0, 100.0)  # all on one rank of the first plan


def simulated(steps: int, price: float = 0.0, max_loss: float = 1.0) -> Result:
    return simulate(FIRST, np.tile(HOT, (steps, 1)), 5, max_loss, 0.5, 16, lambda old, new: price)


@pytest.mark.parametrize("profile", ["flops", "h100"])
def test_times_of_steps_are_those_that_the_decision_sees(profile):
    cost = CostModel(profile_named(profile), 4096)
    plan = plan_model([(9e4, 1e4, 1e4)], [(3000, 1000, 1000)], 4, cost, cut_multiple=16)
    tokens_TE = np.random.default_rng(0).lognormal(9, 1, (6, 3))
    tokens_TE[2, 1] = 0
    assert plan.layers[0].cuts
    np.testing.assert_allclose(step_times(plan, tokens_TE), [stage_time(plan, [tokens_E]) for tokens_E in tokens_TE])


def test_constant_loads_change_once_and_the_sums_are_right():
    step = stage_time(FIRST, [HOT])
    result = simulated(100, price=2 * step)
    assert result.moves == (5,) and result.stay == pytest.approx(100 * step)
    assert step <= result.moving <= 4 * step
    fast = (result.replanned - result.moving - 5 * step) / 95
    assert fast < step and result.oracle == pytest.approx(100 * fast + 2 * step)
    assert result.gain_of_oracle == pytest.approx(result.gain / result.possible)


def test_without_leave_to_lose_it_stays():
    result = simulated(50, max_loss=0.0)
    assert result.moves == () and result.replanned == pytest.approx(result.stay) and result.possible > 0.1


def test_nothing_to_gain_gives_no_share():
    assert math.isnan(Result(100.0, 101.0, 100 - 99 * LEAST_GAIN, 0.0, ()).gain_of_oracle)


def test_the_table_has_a_row_for_each_workload_and_start():
    cases = [Case("W1", start, experts, "h100", 0) for start in ("contiguous", "planned") for experts in (16, 64)]
    results = [Result(100.0, 95.0 - n, 90.0, 0.0, (1,) * n) for n in range(len(cases))]
    assert campaign_table(zip(cases, results, strict=True)).splitlines()[2:] == [
        "| W1 | contiguous | 10.00 to 10.00 | 5.00 to 6.00 | 0.500 | 0 to 1 |",
        "| W1 | planned | 10.00 to 10.00 | 7.00 to 8.00 | 0.700 | 2 to 3 |",
    ]


def test_a_standard_case_gains_most_of_what_the_oracle_does():
    result = Case("W1", "planned", 64, "flops", 0, steps=400).result()
    assert result.moves and result.gain_of_oracle > 0.8
