"""The metrics tracker as Megatron's loop calls it: what it logs, when, and that it touches nothing in between."""

import json
from types import SimpleNamespace

import torch

from hmoe_megatron.config import HMoEConfig
from hmoe_megatron.telemetry.accounting import ParameterCounts
from tests.distributed.ranks import run_ranks
from tests.distributed.test_router import WIDTHS

COEFFS = {"p_penalty_coeff": 0.7, "router_entropy_coeff": 0.4}


class Writer(dict):
    def add_scalar(self, name, value, iteration):
        self[name, iteration] = float(value)


def report_five_steps(run_dir):
    """(scalars written, whether expert time was on during each step, console of the total loss) at log interval 2."""
    from megatron.core import parallel_state

    from hmoe_megatron.placement.planner import contiguous_plan
    from hmoe_megatron.telemetry.counters import RoutingStats
    from hmoe_megatron.telemetry.tracker import HMoEMetricsTracker

    parallel_state.initialize_model_parallel(expert_model_parallel_size=2)
    plan = contiguous_plan([WIDTHS], 2)
    layout = SimpleNamespace(
        settings=HMoEConfig(router="topp", top_p=0.6, **COEFFS),
        stats=RoutingStats([0], 4),
        layers=[0],
        widths={0: WIDTHS},
        plan=plan,
        pieces=lambda layer: plan.layers[0].pieces,
    )
    tracker = HMoEMetricsTracker(
        layout, 8, ParameterCounts(10, 24 * sum(WIDTHS)), 2, run_dir, None, lambda steps: 100.0 * steps
    )
    writer, timed, totals = Writer(), [], {}
    for iteration in range(1, 6):
        timed.append(layout.stats.timing)
        layout.stats.record(0, torch.tensor([4, 3, 2, 1]), 8)
        tracker.record("p_penalty_loss", torch.tensor(3.0), 1, 1)
        tracker.record("router_entropy_loss", torch.tensor(2.0), 1, 1)
        tracker.report(
            1.0,
            iteration,
            writer,
            None,
            track_names=[],
            num_layers=1,
            moe_layer_freq=1,
            force_initialize=True,
            total_loss_dict=totals,
        )
    return dict(writer), timed, {name: float(value) for name, value in totals.items()}, tracker.active_width


def test_the_tracker_logs_every_second_step(tmp_path):
    ranks = run_ranks(2, report_five_steps, tmp_path)
    for scalars, timed, totals, active_width in ranks:
        assert timed == [False, True, False, True, False], "time is measured in the steps that log, only"
        assert totals == {"p_penalty_loss": 15.0, "router_entropy_loss": 10.0}
        assert {iteration for _, iteration in scalars} == {2, 4}, "a step that does not log writes nothing"
        assert scalars["p_penalty_loss", 2] == 3.0 and scalars["router_entropy_loss", 4] == 2.0
        assert active_width == sum(n * w for n, w in zip([4, 3, 2, 1], WIDTHS, strict=True)) / 8
    records = [json.loads(line) for line in (tmp_path / "telemetry.jsonl").read_text().splitlines()]
    assert [record["iteration"] for record in records] == [2, 4]
    assert records[0]["layers"][0]["token_share"] == [0.4, 0.3, 0.2, 0.1]
    assert records[0]["experts_per_token"] == 10 / 8
    assert [record["tokens_per_s"] for record in records] == [200, 200], "of the steps since the last that logged"
    assert ranks[1][0]["hmoe/experts_per_token", 2] == 10 / 8 and ("hmoe/experts_per_token", 2) not in ranks[0][0]
