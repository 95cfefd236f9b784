"""Telemetry: shares, activated parameters, balance, the file of a resumed run, no synchronisation while counting."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from hmoe_megatron.moe.losses import p_penalty, router_entropy
from hmoe_megatron.moe.router import top_p_routing
from hmoe_megatron.placement.plan import Piece
from hmoe_megatron.telemetry.accounting import ParameterCounts
from hmoe_megatron.telemetry.counters import RoutingStats
from hmoe_megatron.telemetry.record import console_line, max_over_mean, over_layers, routing_record, summary
from hmoe_megatron.telemetry.writer import TelemetryFile

HIDDEN = 4
PIECES = ((Piece(0, 0, 10), Piece(1, 0, 5)), (Piece(1, 5, 30),))


def layout():
    return SimpleNamespace(
        layers=[1, 3],
        widths={1: (10, 30), 3: (10, 30)},
        pieces=lambda layer: PIECES,
        plan=SimpleNamespace(layers=[SimpleNamespace(pieces=PIECES)] * 2),
    )


def record():
    counts_LE, tokens_L = np.array([[6, 2], [8, 0]]), np.array([4, 4])
    return routing_record(counts_LE, tokens_L, layout(), HIDDEN, ParameterCounts(always_active=100, experts=960))


def test_shares_and_activated_parameters():
    first, second = record()["layers"]
    assert (first["layer"], second["layer"]) == (1, 3)
    assert first["token_share"] == [0.75, 0.25]
    assert first["flops_share"] == [0.5, 0.5]  # 6 x 10 and 2 x 30
    assert first["experts_per_token"] == 2
    assert first["activated_expert_parameters"] == 3 * HIDDEN * 120 / 4
    assert second["activated_expert_parameters"] == 3 * HIDDEN * 80 / 4
    assert record()["activated_parameters"] == 100 + 3 * HIDDEN * (120 + 80) / 4
    assert record()["active_width"] == (30 + 20) / 2
    assert record()["total_parameters"] == 1060
    assert record()["experts_without_token"] == [[3, 1]]


def test_balance_of_ranks_counts_pieces():
    first, second = record()["layers"]
    assert first["flops_balance"] == max(70, 50) / 60  # rank 0: 6 x 10 + 2 x 5; rank 1: 2 x 25
    assert first["token_balance"] == max(8, 2) / 5  # the cut expert's tokens reach both ranks
    assert second["flops_balance"] == 2
    assert record()["flops_balance"] == max(150, 50) / 100
    assert max_over_mean([0, 0]) == 1


def test_summary_over_layers():
    assert summary([1, 2, 3, 4, 5]) == {"min": 1, "p50": 3, "p90": 4.6, "p95": 4.8, "max": 5}
    assert over_layers(record())["experts_per_token"] == {"min": 2, "p50": 2, "p90": 2, "p95": 2, "max": 2}


def test_the_console_line_fits_a_terminal():
    large = {"iteration": 1234567, "time_balance": 1.234, "activated_parameters": 68e9, "total_parameters": 255e9}
    line = console_line(record() | large)
    assert line == (
        " hmoe 1234567 | active 68000.0M of 255000.0M, 2.00 experts/token | max/mean FLOPs 1.50 time 1.23 | idle 1"
    )
    assert len(console_line(record() | large | {"activated_parameters": 68e6, "total_parameters": 255e6})) <= 100
    assert "\n" not in line


def read(path):
    return [json.loads(line)["iteration"] for line in path.read_text().splitlines()]


def test_a_resumed_run_drops_the_steps_it_does_again(tmp_path):
    first = TelemetryFile(tmp_path)
    for iteration in (10, 20, 30):
        first.write({"iteration": iteration})
    with (tmp_path / "telemetry.jsonl").open("a") as file:
        file.write('{"iteration": 4')  # killed while writing
    resumed = TelemetryFile(tmp_path)
    resumed.write({"iteration": 20})
    resumed.write({"iteration": 30})
    assert read(tmp_path / "telemetry.jsonl") == [10, 20, 30]


def test_telemetry_is_never_nan(tmp_path):
    with pytest.raises(ValueError, match="JSON compliant"):
        TelemetryFile(tmp_path).write({"iteration": 1, "x": float("nan")})


def test_counting_never_copies_to_the_host():
    """A meta tensor has no data: reading one raises. Routing, losses and counters must not need any."""
    probs_TE = torch.rand(6, 4, device="meta")
    _, routing_map_TE = top_p_routing(probs_TE, 0.6, 3)
    counts_E = routing_map_TE.sum(0)
    stats = RoutingStats([0, 2], 4)
    stats.record(2, counts_E, 6)
    stats.record(2, counts_E, routing_map_TE.any(1).sum())
    assert p_penalty(counts_E, probs_TE.sum(0), torch.ones(4, device="meta"), 6).device.type == "meta"
    assert router_entropy(probs_TE.log(), None, 6).device.type == "meta"
    with pytest.raises((RuntimeError, NotImplementedError)):
        counts_E.tolist()


def test_counters_start_again_after_they_are_taken():
    stats = RoutingStats([0, 2], 3)
    stats.record(2, torch.tensor([4, 0, 1]), 5)
    stats.record(2, torch.tensor([1, 0, 1]), torch.tensor(3))
    counts, tokens, _ = stats.take([], torch.device("cpu"))
    assert counts.tolist() == [[0, 0, 0], [5, 0, 2]] and tokens.tolist() == [0, 8]
    counts, tokens, _ = stats.take([], torch.device("cpu"))
    assert not counts.any() and not tokens.any()


class FakeEvent:
    clock = 0.0

    def __init__(self, enable_timing=False):
        self.at = None

    def record(self):
        FakeEvent.clock += 1
        self.at = FakeEvent.clock

    def elapsed_time(self, end):
        return end.at - self.at


def test_expert_time_counts_forward_and_backward_of_steps_that_log(monkeypatch):
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    stats, x = RoutingStats([0], 1), torch.ones(2, requires_grad=True)
    stats.timing = True

    def step():
        with stats.expert_time(x * 1) as timed:
            timed.output = torch.exp(x)
        return timed.output

    routed = x * 1
    with stats.expert_time(routed) as timed:
        timed.output = routed.exp()
    assert stats.take_expert_time_ms() == 1
    with stats.expert_time(routed) as timed:
        timed.output = routed.exp()
    timed.output.sum().backward()
    assert stats.take_expert_time_ms() == 2, "one tick forward, one backward"
    with stats.expert_time(routed, training=False):
        pass
    assert stats.take_expert_time_ms() == 0, "evaluation is not timed"
    stats.timing = False
    step().sum().backward()
    assert stats.take_expert_time_ms() == 0


def test_a_full_disk_costs_records_but_not_the_run(tmp_path, monkeypatch, capsys):
    file = TelemetryFile(tmp_path)
    file.write({"iteration": 1})
    opened = file._file

    class Full:
        """Takes half of a line."""

        fileno, truncate = opened.fileno, opened.truncate

        def write(self, line):
            return opened.write(line[: len(line) // 2])

    monkeypatch.setattr(file, "_file", Full())
    file.write({"iteration": 2})
    file.write({"iteration": 3})
    monkeypatch.setattr(file, "_file", opened)
    file.write({"iteration": 4})
    assert [json.loads(line)["iteration"] for line in file.path.read_text().splitlines()] == [1, 4]
    assert capsys.readouterr().out.count("No space left on device: records are lost, training goes on") == 1
