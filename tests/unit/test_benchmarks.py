"""The benchmarks' tables from small inputs: they run, and the numbers in them are those of the plans."""

import re
from types import SimpleNamespace

import numpy as np
import pytest

from benchmarks import planner, planner_real, replan
from benchmarks.machine import stamp
from hmoe_megatron.placement import contiguous_plan


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(planner, "SIZES", [(8, 4)])


def rows(lines):
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| 8/4")]


def test_flops_table(small):
    lines = list(planner.flops_tables())
    for _, schedule, *over_mean, planned, most_cuts, allowed in rows(lines):
        worst = max(
            planner.over_mean(contiguous_plan([widths], 4, [tokens]))
            for tokens, widths in (planner.layer(schedule, load, 8, 4, planner.FLOPS_UNIT) for load in planner.LOADS)
        )
        assert float(over_mean[0]) == pytest.approx(worst, abs=1e-3)
        assert 1 <= float(planned) <= min(map(float, over_mean)) and int(most_cuts) <= int(allowed) == 3
    assert len(rows(lines)) == 2 and lines[-1] == "\nOver 1.01: none."


def test_gpu_table(small):
    lines = list(planner.gpu_tables())
    assert [row[1:3] for row in rows(lines)] == [["9..23", "1"], ["9..23", "4"], ["hybrid", "1"], ["hybrid", "4"]]
    for row in rows(lines):
        assert len(row) == 3 + len(planner.LOADS) + 4 and all(float(cell) >= 0 for cell in row[3:])
    assert "Slower than the best whole-expert plan: 0 cases" in lines[-1]


def test_the_report_of_a_training_run():
    def run(step_ms, expert_ms, predicted_ms):
        return planner_real.Run(np.full(5, step_ms), np.tile(expert_ms, (5, 1)), np.tile(predicted_ms, (5, 1)))

    plan = contiguous_plan([[10, 30]], 2)
    lines = planner_real.report(
        {"contiguous": [run(100.0, [30.0, 10.0], [24.0, 8.0])], "planned": [run(90.0, [20.0, 20.0], [16.0, 16.0])]},
        plan,
    )
    assert "| contiguous | 100 | 30.0, 10.0 | 1.500 | 24.0, 8.0 | 1.500 |" in lines
    assert "| planned | 90 | 20.0, 20.0 | 1.000 | 16.0, 16.0 | 1.000 |" in lines
    text = " ".join(lines)
    assert "step time 0.900 (of pairs of runs 0.900)" in text and "0.667 measured, 0.667 predicted" in text
    assert "median error 20.0%" in text and "Cuts in the plan: 0" in text


def test_a_figure_says_where_it_is_from():
    assert re.search(r", \d+ cores, Python 3\.\d+\.\d+, numpy [\d.]+; \d{4}-\d\d-\d\d, commit \w+", stamp("numpy"))


def test_the_page_of_runs_whose_experts_move():
    def run(first_s, then_s, first_ms, then_ms, changes):
        count = replan.INTERVAL
        return replan.Run(
            [first_s] * count + [then_s] * count,
            [0.0] * 2 * count,
            [[[first_ms], [100.0]]] * count + [[[then_ms], [100.0]]] * count,
            [1.75] * 2 * count,
            changes,
        )

    change = {"s": 0.2, "bytes": [1_000_000, 2_000_000], "sending_s": 0.1, "failure": ""}
    runs = {
        replan.STILL: run(1.0, 1.0, 300.0, 300.0, []),
        replan.MOVING: run(1.0, 0.875, 300.0, 100.0, [(replan.INTERVAL, change)]),
    }
    text = replan.page(
        {"own": runs}, {"save_s": 1.0, "start_s": 9.0}, SimpleNamespace(steps=30, warm_up=0, workloads="own"), 0.0
    )
    assert "| own | 1 | 1000 | 875 | 125 | 150 | 0.83 | 1.500 | 1.000 | 1.333 | 0.0 | 0.938 |" in text
    assert "| own | 15 | 3.0 | 200 | 100.0 | 2.0 | 0.21 | 0.020 | 1.500 | 1.000 | 125 | 2 | 80 |" in text
    assert "| own | 16 to 30 | 1000 | 1.500 | 1.750 | 875 | 1.000 | 1.750 | 0.875 | 3.0 MB | 0 |" in text
    verdicts = [line.rstrip(" |").rsplit("| ", 1)[1] for line in text.splitlines() if "| at " in line]
    assert verdicts == ["MISSED", "met", "met", "MISSED", "met"]
