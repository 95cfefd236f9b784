"""`make gpu` as far as a machine without a GPU goes: every item on small shapes, its limits, its files."""

import json
import threading
from types import SimpleNamespace

import pytest
import torch

from benchmarks.duel import Side
from benchmarks.gpu import __main__ as command
from benchmarks.gpu import correctness, ffn, items, rates, report, rows, runs, steps
from benchmarks.gpu.items import ITEMS, Session
from benchmarks.gpu.runs import RUNS, Run, Server, lacking, verdict
from benchmarks.gpu.table import Table
from tests.distributed.ranks import run_ranks


@pytest.fixture
def printed(capfd):
    """() -> rows printed since the last call."""
    return lambda: [json.loads(line) for line in capfd.readouterr().out.splitlines() if line.startswith("{")]


def test_correctness(printed):
    correctness.main(["--tiny"])
    named, graph = printed()
    assert named["cases"] == 2 and named["failed"] == [] and named["different in a second run"] == []
    assert 0 < named["worst"]["dW1"] < 1e-6 and "skipped" in graph


def test_random_cases_are_of_their_kind():
    import random

    for kind in range(correctness.KINDS):
        for number in range(20):
            case = correctness.random_case(random.Random(number), kind)
            assert (case.hidden % 256 == 0) == bool(kind & 1) and case.hidden % 16 == 0
            assert all(width % 256 == 0 for width in case.widths) == bool(kind & 2)
            assert all(width % 8 == 0 for width in case.widths) and case.accumulate == bool(kind & 4)
            assert len(case.rows) == len(case.widths)


def test_a_wrong_result_is_a_row(printed, monkeypatch):
    monkeypatch.setattr(correctness, "ragged_experts", lambda x, *given: x.sum() * torch.zeros_like(x))
    correctness.main(["--tiny"])
    assert len(printed()[0]["failed"]) >= 2


def test_times_of_the_experts(printed, monkeypatch):
    monkeypatch.setattr(rows, "TINY_CALLS", 1)
    ffn.main(["--tiny"])
    found = printed()
    ways = {row["way"]: row for row in found if "way" in row}
    assert {"triton", "dense FFN", "loop", "grouped_mm, equal widths"} <= ways.keys()
    assert all(row["ms"] > 0 for row in ways.values())
    assert ways["triton"]["tflops"] == pytest.approx(18 * 32 * (5 * 24 + 3 * 40) / ways["triton"]["ms"] / 1e9)
    kernels = [row["kernel"] for row in found if "kernel" in row]
    assert len(kernels) == 10 and "fc1 grad, added" in kernels
    (ratios,) = (row["ratios"] for row in found if "ratios" in row)
    assert ratios["loop"] == pytest.approx(ways["triton"]["ms"] / ways["loop"]["ms"])


def test_the_shapes_are_those_of_the_document():
    assert ffn.SHAPES["3B"].widths == (4608, 5632, 6656, 7680, 8704, 9728, 10752, 11776)
    assert sum(ffn.SHAPES["fine"].widths) == 64 * 1408 and sum(ffn.SHAPES["fine, Zipf"].rows) == 49152
    for shape in (*ffn.SHAPES.values(), *ffn.SWEEP.values()):
        assert len(shape.rows) == len(shape.widths) and not any(width % 8 for width in shape.widths)


def test_the_hardware_profile(printed, tmp_path):
    rates.main(["--tiny", "--seconds", "0.1", "--output", str(tmp_path / "profile.json")])
    (measured, here, published) = printed()
    assert measured["rates"]["flops_per_s"] > 0 and (tmp_path / "profile.json").exists()
    assert here["layers"] == published["layers"] > 0 and published["profile"] == "published h100"


def two_runs():
    torch.set_num_threads(1)
    model = runs.MODEL.replace("--hidden-size 256", "--hidden-size 64").replace("--seq-length 128", "--seq-length 16")
    server = Server(torch.distributed.group.WORLD, model, steps=runs.SAVED + 1)
    found = server.run("", resume=True)
    refused = server.run("--no-such-flag"), server.run("--load /no-such-folder --exit-on-missing-checkpoint")
    return found, server.run("--seed 99"), server.run("", again=True), refused


def test_many_runs_in_one_process():
    ((found, other, again, refused),) = run_ranks(1, two_runs, timeout_s=120)
    assert len(found["losses"]) == runs.SAVED + 1 and found["losses"][-1] < found["losses"][0]
    assert again["losses"] == found["losses"] != other["losses"]
    assert found["resumed"] == found["losses"][runs.SAVED :], "it goes on with the data and the state of the checkpoint"
    assert "SystemExit" in refused[0]["failed"] and "does not exist" in refused[1]["failed"]


def test_verdicts():
    falls = Run("a", 1, "")
    assert verdict(falls, {"losses": [2.0, 1.0]}, None)["ok"] and not verdict(falls, {"losses": [1.0, 1.0]}, None)["ok"]
    near = Run("b", 1, "", "", bound=1e-2)
    assert verdict(near, {"losses": [1.0, 1.0]}, {"losses": [1.0, 1.005]})["ok"]
    far = verdict(near, {"losses": [1.0, 1.0]}, {"losses": [1.0, 1.5]})
    assert not far["ok"] and far["apart"] == pytest.approx(1 / 3)
    assert not verdict(near, {"losses": [1.0]}, {"failed": "why"})["ok"]
    assert not verdict(falls, {"losses": [2.0, float("nan")]}, None)["ok"]


def test_what_a_machine_lacks_is_named():
    by_name = {run.name: run for run in RUNS}
    assert lacking(by_name["EP2"], 1, (9, 0), False) == "needs 2 GPUs, this machine has 1"
    assert lacking(by_name["FP8"], 1, (9, 0), False) == "needs Transformer Engine"
    assert lacking(by_name["FP8"], 1, (8, 0), True) == "needs compute capability 8.9"
    assert lacking(by_name["FP8"], 1, (9, 0), True) is None and lacking(by_name["no flag"], 1, (8, 0), False) is None
    assert lacking(by_name["flex, DeepEP"], 8, (9, 0), True) == "needs deep_ep"


ROWS = {
    "correctness": [
        {
            "what": "named cases",
            "dtype": "bfloat16",
            "cases": 10,
            "of": 11,
            "failed": ["one row: y off"],
            "worst": {"y": 2.3e-3},
            "different in a second run": [],
        },
        {"what": "memcheck", "cases": 2, "skipped": "not installed"},
    ],
    "ffn": [
        {"shape": "fine", "way": "triton", "ms": 4.5, "tflops": 569.0, "bytes": 1 << 30},
        {"shape": "fine", "way": "loop", "failed": "OutOfMemoryError: x"},
        {"shape": "fine", "ratios": {"dense FFN": 0.94}},
        {"shape": "fine", "kernel": "up", "ms": 0.86, "tflops": 657.0},
    ],
    "steps": [
        {
            "model": "0.4B",
            "side": "ours",
            "build_s": 0.2,
            "expert_parameters": 28_000_000,
            "to_first_loss_s": 40.0,
            "first_step_ms": 900.0,
            "first_loss": 10.4,
        },
        {
            "model": "0.4B",
            "what": "step, ours over Megatron's",
            "ratio": 0.98,
            "least": 0.97,
            "most": 1.0,
            "ms": {"ours": 98.0, "stock": 100.0},
        },
        {
            "model": "0.4B",
            "side": "ours",
            "parts_ms": {"experts": 40.0, "rest": 50.0},
            "step_ms": 98.0,
            "bytes": 1 << 33,
            "experts": 2.0,
        },
        {"model": "0.4B", "side": "ours", "kernels": [["up", 12, 10.0]]},
        {"model": "0.4B", "failed": "a\nOOM"},
    ],
    "runs": [
        {"run": "no flag", "ok": True, "first": 6.3, "last": 6.2},
        {"run": "EP2", "skipped": "needs 2 GPUs"},
        {"run": "TE", "ok": False, "failed": "RuntimeError: x"},
    ],
    "rates": [{"profile": "h100", "layers": 9, "median_error": 0.1, "worst_error": 0.3, "over_measured": 1.1}],
}


def test_the_page_and_the_console(tmp_path):
    table = Table(tmp_path)
    table.machine = {"stamp": "1 x NVIDIA X"}
    for item, of in ROWS.items():
        for row in of:
            table.add(item, row)
    table.note("runs", "cut off after 9 s")
    page = (tmp_path / "gpu.md").read_text()
    for words in (
        "1 x NVIDIA X",
        "| fine | triton | 4.500 | 569 | 1.00 |",
        "0.980 (0.970 to 1.000), 98.0 against",
        "| 0.4B, ours | 98.0 | 0.0 | 0.0 | 0.0 | 40.0 | 0.0 | 0.0 | 50.0 | 8.0 | 2.00 |",
        "10 of 11",
        "failed: OOM",
        "| EP2 | needs 2 GPUs |",
        "FAILED RuntimeError: x",
        "Not whole: cut off after 9 s",
    ):
        assert words in page, words
    data = json.loads((tmp_path / "gpu.json").read_text())
    assert data["items"]["ffn"] == ROWS["ffn"] and data["not whole"] == {"runs": "cut off after 9 s"}
    assert table.wrong() == ["correctness", "ffn", "runs", "steps"]
    assert all(len(report.line(item, row)) <= 100 for item, of in ROWS.items() for row in of)


def test_a_command_that_hangs_or_dies_costs_its_limit_only(tmp_path):
    row = {"what": "a", "cases": 1}
    (tmp_path / "hangs.py").write_text(f"import time; print({json.dumps(row)!r}, flush=True); time.sleep(60)")
    (tmp_path / "dies.py").write_text("raise SystemExit('no more memory')")
    table = Table(tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(tmp_path))
        items.in_processes(Session(table, tmp_path), "correctness", [["hangs"], ["dies"]], 3)
    assert table.rows["correctness"] == [row] and table.wrong() == ["correctness"]
    assert table.notes["correctness"] == "cut off after 3 s; exit code 1: no more memory"


def test_a_row_of_another_form_is_a_note(tmp_path):
    table = Table(tmp_path)
    table.add("runs", {"name": "no run"})
    table.add("runs", ROWS["runs"][0])
    assert table.rows["runs"] == ROWS["runs"][:1] and "another form" in table.notes["runs"]
    assert table.wrong() == ["runs"]


def test_what_a_thread_still_says_after_its_limit_is_dropped(tmp_path):
    ended, late = threading.Event(), []

    def work(emit, stopped):
        emit(**ROWS["runs"][0])
        ended.wait(30)
        emit(**ROWS["runs"][1])
        late.append(stopped.is_set())

    session = Session(Table(tmp_path), tmp_path)
    session.servers = {1: SimpleNamespace(__exit__=ended.set)}
    items.in_thread(session, "runs", work, 0.5)
    assert late == [True] and session.table.rows["runs"] == ROWS["runs"][:1]
    assert session.table.notes["runs"] == "cut off after 0 s" and not session.table.wrong()
    items.in_thread(session, "steps", lambda emit, stopped: 1 / 0, 5)
    assert session.table.wrong() == ["steps"] and "ZeroDivisionError" in session.table.notes["steps"]


def test_time_that_an_item_leaves_goes_to_the_next(tmp_path, monkeypatch):
    limits = {}
    monkeypatch.setattr(
        items, "ITEMS", {item: lambda session, limit_s, item=item: limits.update({item: limit_s}) for item in ITEMS}
    )
    monkeypatch.setattr(Session, "start", lambda *_: None)
    items.do(Session(Table(tmp_path), tmp_path), list(ITEMS), 360)
    assert limits["correctness"] == pytest.approx(360 * 75 / 360, rel=0.05)
    assert limits["rates"] == pytest.approx(360, rel=0.05), "the last has all that is left"


def test_a_run_whose_process_dies_costs_itself_only(tmp_path):
    """The process ends in the first run; the second has a new one."""
    (tmp_path / "answers.py").write_text("""
import json, sys
print(json.dumps({"ready_s": 1}), flush=True)
while line := sys.stdin.readline():
    if "dies" in line:
        raise SystemExit("out of memory")
    print(json.dumps({"losses": [2.0, 1.0]}), flush=True)
""")
    session = Session(Table(tmp_path), tmp_path)
    session.server = lambda ranks: Side("runs", "", "", tmp_path / "side.log", ranks, "answers")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(tmp_path))
        session.servers = {1: session.server(1)}
        found = [items.one_run(session, Run(flags, 1, flags), threading.Event()) for flags in ("dies", "works")]
        session.end_of("runs")
    assert found[0] == {"ok": False, "failed": "out of memory"} and found[1]["ok"]


def test_without_a_gpu_it_says_so_and_writes_nothing(tmp_path, capsys):
    assert command.main(["--output", str(tmp_path)]) == 2
    assert "torch finds no GPU" in capsys.readouterr().err and not list(tmp_path.iterdir())


@pytest.mark.campaign
def test_steps_beside_megatrons(tmp_path):
    found, sides = [], steps.start(False, steps.TINY, tmp_path)["tiny"]
    sides["broken"] = Side("broken", "ours", "", tmp_path / "broken.log", 1, "no_such_module")
    steps.compare_or_say("tiny", sides, lambda **row: found.append(row), tiny=True)
    assert [row.get("side") for row in found] == [
        "ours",
        "stock",
        None,
        None,
        "ours",
        "ours",
        "stock",
        "stock",
        "ours, Top-P",
        None,
        "ours, Top-P",
        "ours, Top-P",
        "broken",
        None,
    ]
    assert found[4]["experts"] == 2 and 1 < found[10]["experts"] < 3 and "no_such_module" in found[12]["failed"]
    assert found[9]["what"] == "step, ours over ours, Top-P"
    assert all(side.first.poll() is not None for side in sides.values())
    ours, stock = found[:2]
    assert ours["expert_parameters"] == stock["expert_parameters"] > 0 and ours["build_s"] < ours["to_first_loss_s"]
    assert found[3]["what"] == "step, ours over Megatron's" and found[3]["ratio"] > 0
    parts = found[4]["parts_ms"]
    assert set(report.PARTS) == parts.keys() and sum(parts.values()) == pytest.approx(found[4]["step_ms"])
    assert parts["experts"] > 0 and parts["optimizer"] > 0 and found[5]["kernels"]


@pytest.mark.campaign
def test_the_whole_command(tmp_path):
    code = command.main(["--tiny", "--output", str(tmp_path / "new" / "folder")])
    data = json.loads((tmp_path / "new" / "folder" / "gpu.json").read_text())
    assert code == 0 and set(data["items"]) == set(ITEMS) and data["not whole"] == {}, data
    assert (tmp_path / "new" / "folder" / "gpu_logs.tar.gz").stat().st_size > 1000
