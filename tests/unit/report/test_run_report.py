"""The report of a run: what it reads, refuses, draws and writes."""

import json
import re
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter
from torch.utils.tensorboard import SummaryWriter

from hmoe_megatron import files, training
from hmoe_megatron.placement import CostModel, LayerPlan, Piece, PlacementPlan
from hmoe_megatron.placement.cost import predict
from hmoe_megatron.placement.ranks import as_ranks
from hmoe_megatron.telemetry import reader as telemetry_file
from hmoe_megatron.telemetry import record as of_a_step
from hmoe_megatron.telemetry.accounting import ParameterCounts
from hmoe_megatron.tools import run_report
from hmoe_megatron.tools.report import run_files, training_pictures
from hmoe_megatron.tools.report.run_page import write_report
from hmoe_megatron.tools.report.scalars import TRAINING, VALIDATION, read_scalars

HIDDEN, TOKENS = 2, 5
WIDTHS = (30, 10, 40, 20)  # narrow to wide: experts 1, 3, 0, 2
PIECES = ((Piece(0, 0, 30), Piece(1, 0, 10)), (Piece(2, 0, 40), Piece(3, 0, 20)))
LAYERS = [1, 3]
COUNTS_NLE = [[[1, 1, 1, 1], [1, 1, 1, 1]], [[4, 3, 2, 1], [1, 1, 1, 7]], [[5, 5, 0, 0], [0, 5, 0, 5]]]
PICTURES = ["loss.png", "expert_share.png", "activated_parameters.png", "rank_balance.png"]


def layer_plan(pieces, widths):
    tokens = (1,) * len(widths)
    cost = CostModel(hidden_size=HIDDEN)
    return LayerPlan(pieces, widths, tokens, predict(pieces, tokens, cost, as_ranks(len(pieces)), 0))


def records():
    """Three steps by the code that writes them."""
    plan = PlacementPlan((layer_plan(PIECES, WIDTHS),) * 2)
    layout = SimpleNamespace(layers=LAYERS, widths=dict.fromkeys(LAYERS, WIDTHS), plan=plan, pieces=lambda _: PIECES)
    parameters = ParameterCounts(1000, 2 * 3 * HIDDEN * sum(WIDTHS))
    steps = []
    for number, counts_LE in enumerate(COUNTS_NLE, start=1):
        record = of_a_step.routing_record(counts_LE, [TOKENS] * 2, layout, HIDDEN, parameters)
        record |= {"iteration": 10 * number, "expert_time_ms": [1.0, 3.0], "tokens_per_s": 1000.0 * number}
        record["time_balance"] = of_a_step.max_over_mean(record["expert_time_ms"])
        steps.append(record | {"over_layers": of_a_step.over_layers(record)})
    return steps, plan


def write_telemetry(directory, steps):
    (directory / run_files.TELEMETRY_FILE).write_text("".join(json.dumps(step) + "\n" for step in steps))


def write_scalars(directory, tag, pairs):
    with SummaryWriter(directory) as writer:
        for step, value in pairs:
            writer.add_scalar(tag, value, step)


def make_run(directory):
    """A whole run directory."""
    directory.mkdir(exist_ok=True)
    steps, plan = records()
    write_telemetry(directory, steps)
    plan.save(directory / run_files.PLAN_FILE)
    scalars = directory / "tensorboard"
    write_scalars(scalars, "lm loss", [(step, 8 - step / 10) for step in range(1, 31)])
    write_scalars(scalars, "lm loss validation", [(10, 7.5), (20, 6.5), (30, 5.5), (30, 99.0)])
    write_scalars(scalars, "p_penalty_loss", [(1, 1.25), (30, 1.0)])
    return directory


def read(directory, notes=None):
    return run_files.read_run(directory, [] if notes is None else notes)


@pytest.fixture
def run_dir(tmp_path):
    return make_run(tmp_path / "run")


def test_the_names_are_those_that_training_writes():
    assert (run_files.TELEMETRY_FILE, run_files.PLAN_FILE) == (files.TELEMETRY_FILE, training.PLAN_FILE)


def test_a_run_is_the_known_numbers(run_dir):
    """Of five tokens a layer; experts 1, 3, 0, 2 from narrow to wide."""
    notes = []
    run = read(run_dir, notes)
    assert run.iteration_N.tolist() == [10, 20, 30] and notes == []
    assert run.expert_E.tolist() == [1, 3, 0, 2] and run.width_E.tolist() == [10, 20, 30, 40]
    share_NE = [[0.25, 0.25, 0.25, 0.25], [0.2, 0.4, 0.25, 0.15], [0.5, 0.25, 0.25, 0]]
    np.testing.assert_allclose(run.share_NE, share_NE, rtol=1e-12)
    np.testing.assert_allclose(run.ratio_NE, np.array([[1, 1, 1, 1], [2, 4, 2.5, 1.5], [5, 2.5, 2.5, 0]]) / 5)
    # 3 x hidden x tokens x width / tokens routed, e.g. layer 1 at 20: 6 x (4 30 + 3 10 + 2 40 + 1 20) / 5
    np.testing.assert_allclose(run.active_NL, [[120, 120], [300, 264], [240, 180]], rtol=1e-12)
    np.testing.assert_allclose(run.active_N, [1240, 1564, 1420], rtol=1e-12)
    assert run.total_parameters == 2200 and run.layer_L.tolist() == LAYERS
    np.testing.assert_allclose(run.balance["flops_balance"], [120 / 100, 280 / 235, 2 * 250 / 350], rtol=1e-12)
    np.testing.assert_allclose(run.balance["token_balance"], [1, 1.1, 1.5], rtol=1e-12)
    np.testing.assert_allclose(run.balance["time_balance"], [1.5] * 3, rtol=1e-12)


def test_without_a_plan_experts_stay_in_their_order(run_dir):
    (run_dir / run_files.PLAN_FILE).unlink()
    notes = []
    run = read(run_dir, notes)
    assert run.width_E is None and len(notes) == 1 and "widths" in notes[0]
    np.testing.assert_allclose(run.ratio_NE[2], [0.5, 1, 0, 0.5])


def test_losses_are_the_known_numbers(run_dir):
    losses = read_scalars(run_dir / "tensorboard", [])
    assert list(losses) == [TRAINING, VALIDATION, "p_penalty_loss"]
    assert losses[TRAINING].x.tolist() == list(range(1, 31))
    np.testing.assert_allclose(losses[TRAINING].y, 8 - np.arange(1, 31) / 10, rtol=1e-6)  # fp32 in the file
    assert losses[VALIDATION].y.tolist() == [7.5, 6.5, 5.5]  # 99 is the test set, under the same name
    assert losses["p_penalty_loss"].y.tolist() == [1.25, 1]


def test_a_resumed_run_replaces_what_it_did_again(tmp_path):
    notes = []
    write_scalars(tmp_path, "lm loss", [(1, 8), (2, 7), (3, 6), (4, 5)])
    for path in tmp_path.iterdir():
        path.rename(tmp_path / "events.out.tfevents.0000000001.a")
    write_scalars(tmp_path, "lm loss", [(3, 6.5), (4, float("nan"))])
    (tmp_path / "unrelated.txt").write_text("no events")
    curve = read_scalars(tmp_path, notes)["lm loss"]
    assert curve.x.tolist() == [1, 2, 3] and curve.y.tolist() == [8, 7, 6.5]
    assert any("1 values of" in note and "iteration 4" in note for note in notes)


@pytest.mark.parametrize("step, problem", [(-1, "iteration -1"), (2**62, "iteration 4611686"), (None, "corrupt")])
def test_damaged_event_files_are_refused(tmp_path, step, problem):
    path = tmp_path / "events.out.tfevents.1"
    value = Summary.Value(tag="lm loss", simple_value=1.0)
    event = b"\xff" * 20 if step is None else Event(step=step, summary=Summary(value=[value])).SerializeToString()
    with path.open("wb") as file:
        RecordWriter(file).write(event)
    with pytest.raises(ValueError, match=f"{path}: not read as a TensorBoard event file .*{problem}.*remove it"):
        read_scalars(tmp_path, [])


def test_write_report_writes_page_and_pictures(run_dir):
    page, *pictures = write_report(run_dir)
    assert page == run_dir / "report.html" and [path.name for path in pictures] == PICTURES
    assert all(path.parent == run_dir / "figures" and path.read_bytes()[:4] == b"\x89PNG" for path in pictures)
    text = page.read_text()
    for shown in ("7.500 → 5.500", "1.42 k (65%)", "2.2 k", "2, expert-parallel 2", "Experts at iteration 30"):
        assert shown in text, shown
    # layer 1, last step: experts 0 and 1 with five tokens each
    rows = re.findall(r"<tr><td>(\d)</td><td>(\d+)</td><td>([\d.%]+)</td><td>([\d.%]+)</td>", text)
    assert rows[:4] == [
        ("0", "30", "50.00%", "75.00%"),
        ("1", "10", "50.00%", "25.00%"),
        ("2", "40", "0.00%", "0.00%"),
        ("3", "20", "0.00%", "0.00%"),
    ]
    assert text.count('<td class="idle">no token</td>') == 4 and text.count("experts without a token: 2") == 2
    assert "layers 0-1: 4 experts on 2 ranks" in text
    assert not list(run_dir.glob(".*")), "temporary files stay behind"


def test_the_page_stands_alone(run_dir):
    text = write_report(run_dir)[0].read_text()
    assert text.count("data:image/png;base64,") == len(PICTURES)
    text = re.sub(r'src="data:image/png;base64,[A-Za-z0-9+/=]+"', "", text)
    assert not re.search(r"//|<script|<link|<iframe|src=|href=|@import|url\(", text)


def test_flags_and_sampled_text_are_on_the_page(run_dir, tmp_path):
    (run_dir / files.RUN_ARGUMENTS_FILE).write_text(json.dumps(["--lr", "1e-3", "--save", "a <b> c"]))
    (tmp_path / "sample.txt").write_text("ROMEO: <i>thou</i>\n")
    text = write_report(run_dir, sample=tmp_path / "sample.txt")[0].read_text()
    assert "<h2>Flags</h2>" in text and "--lr 1e-3 --save &#x27;a &lt;b&gt; c&#x27;" in text
    assert "<h2>Sampled text</h2>" in text and "ROMEO: &lt;i&gt;thou&lt;/i&gt;" in text
    with pytest.raises(ValueError, match="none.txt: No such file"):
        write_report(run_dir, sample=tmp_path / "none.txt")


def test_speed_and_commit_are_on_the_page(run_dir):
    (run_dir / files.RUN_SOFTWARE_FILE).write_text(json.dumps({"commit": "0123abc <dirty>", "torch": "2"}))
    text = write_report(run_dir)[0].read_text()
    assert "<dt>tokens/s, median</dt><dd>2,000</dd>" in text and "<dt>commit</dt><dd>0123abc &lt;dirty&gt;</dd>" in text
    (run_dir / files.RUN_SOFTWARE_FILE).write_text("[")
    with pytest.raises(ValueError, match="run_software.json: .*; remove it, and the report leaves the commit out"):
        write_report(run_dir)


def test_a_run_from_before_speed_and_commit_were_kept(run_dir):
    steps = [{name: value for name, value in step.items() if name != "tokens_per_s"} for step in records()[0]]
    write_telemetry(run_dir, steps)
    text = write_report(run_dir)[0].read_text()
    assert "tokens/s" not in text and "commit" not in text


@pytest.mark.parametrize("last", [5.5, 5.001])
def test_the_last_losses_are_beside_the_curves(run_dir, last):
    """Right of the axes, inside the picture, one above the other, also where both curves end at one value."""
    write_scalars(run_dir / "tensorboard", "lm loss validation", [(31, last)])
    run = replace(read(run_dir), losses=read_scalars(run_dir / "tensorboard", []))
    figure = training_pictures.loss(run)
    figure.draw_without_rendering()
    labels = [text.get_window_extent() for text in figure.axes[0].texts]
    assert len(labels) == 2 and not labels[0].overlaps(labels[1])
    for label in labels:
        assert figure.axes[0].bbox.x1 < label.x0 and label.x1 <= figure.bbox.x1


def test_all_text_is_escaped(tmp_path):
    run_dir = make_run(tmp_path / "<img src=x onerror=alert(1)>&'\"")
    text = write_report(run_dir, tensorboard_dir=run_dir / "<b>none")[0].read_text()
    assert "<img src=x" not in text and "&lt;img src=x onerror=alert(1)&gt;&amp;&#x27;&quot;" in text
    assert "<b>" not in text and "&lt;b&gt;none" in text


def test_a_run_without_plan_and_losses_says_so(run_dir):
    (run_dir / run_files.PLAN_FILE).unlink()
    page, *pictures = write_report(run_dir, run_dir / "out" / "page.html", tensorboard_dir=run_dir / "none")
    assert [path.name for path in pictures] == PICTURES[1:] and pictures[0].parent == run_dir / "out" / "figures"
    text = page.read_text()
    for note in ("No placement_plan.json", "No training loss: no event files", "No validation loss: no event files"):
        assert note in text, note
    assert "not recorded" in text and "<td>?</td>" in text and "Placement of the experts" not in text


@pytest.mark.parametrize("steps, widths", [(1, WIDTHS), (3, (25,) * 4)])
def test_one_step_and_equal_widths_are_drawn(run_dir, steps, widths):
    write_telemetry(run_dir, records()[0][:steps])
    pieces = tuple(tuple(Piece(e, 0, widths[e]) for e in held) for held in ((0, 1), (2, 3)))
    PlacementPlan((layer_plan(pieces, widths),) * 2).save(run_dir / run_files.PLAN_FILE)
    assert len(read(run_dir).iteration_N) == steps
    assert [path.name for path in write_report(run_dir)[1:]] == PICTURES


def test_the_cut_last_line_of_a_killed_run_is_left_out(run_dir):
    path = run_dir / run_files.TELEMETRY_FILE
    path.write_text(path.read_text()[:-40])
    notes = []
    assert read(run_dir, notes).iteration_N.tolist() == [10, 20] and "middle of line 3" in notes[0]


def changed(record, where, value):
    *parents, name = where
    for key in parents:
        record = record[key]
    record[name] = value


@pytest.mark.parametrize(
    "where, value, problem",
    [
        (["iteration"], 10, "iteration 10 is not a whole number from 11 on"),
        (["iteration"], True, "iteration True"),
        (["iteration"], 10**400, "iteration of over 300 digits"),
        (["activated_parameters"], float("nan"), "NaN is no number here"),
        (["over_layers", "token_balance", "max"], float("-inf"), "-Infinity is no number here"),
        (["total_parameters"], "2200", "total_parameters '2200' is not a number"),
        (["total_parameters"], -1, "total_parameters -1 is not a number from 0"),
        (["time_balance"], None, "time_balance None"),
        (["flops_balance"], 1e300, "flops_balance 1e+300"),
        (["expert_time_ms"], [], "expert_time_ms is not a list of 1 to 65536, but 0"),
        (["expert_time_ms", 1], "x" * 9999, "expert_time_ms[1] 'xxx"),
        (["layers"], {}, "layers is not a list"),
        (["layers", 1], 3, "layers[1]: a int, not a JSON object"),
        (["layers", 1, "layer"], 2, "layers [1, 2], the line before has [1, 3]"),
        (["layers", 0, "token_share"], [0.5, 0.5], "token_share is not a list of 4 to 4, but 2"),
        (["layers", 0, "token_share", 2], 1.5, "layers[0]: token_share[2] 1.5 is not a number from 0 to 1"),
        (["layers", 0, "flops_share"], None, "flops_share is not a list of 4 to 4"),
        (["layers", 0, "activated_expert_parameters"], [], "activated_expert_parameters list"),
        (["experts_without_token"], [[1, 0]] * 9, "experts_without_token is not a list of 0 to 8, but 9"),
        (["experts_without_token"], [["<script>", 0]], "experts_without_token: list is not [layer, expert]"),
        (["experts_without_token"], [[1, 4]], "experts_without_token: no layer 1 with expert 4"),
    ],
)
def test_hostile_records_are_refused_with_file_and_line(run_dir, where, value, problem):
    steps, _ = records()
    changed(steps[1], where, value)
    write_telemetry(run_dir, steps)
    with pytest.raises(ValueError, match=re.escape(f"{run_dir / run_files.TELEMETRY_FILE}:2: ")) as error:
        read(run_dir)
    assert problem in str(error.value) and len(str(error.value)) < 400


@pytest.mark.parametrize(
    "line, problem",
    [
        (b"{}\n", "iteration None"),
        (b"[]\n", "a list, not a JSON object"),
        (b"null\n", "a NoneType, not a JSON object"),
        (b"\n", "not read as JSON"),
        (b"\xff\xfe\n", "not read as JSON"),
        (b"[" * 1_000_000 + b"\n", "nested too deeply"),
        (b'{"iteration": ' + b"9" * 5000 + b"}\n", "not read as JSON"),
        (b" " * (telemetry_file.MAX_LINE_BYTES + 1), "too long for a step"),
        (b'{"iteration": 1, "total_parameters": 1e999}\n', "total_parameters inf"),
    ],
)
def test_hostile_lines_are_refused_with_file_and_line(run_dir, line, problem):
    path = run_dir / run_files.TELEMETRY_FILE
    path.write_bytes(line)
    with pytest.raises(ValueError, match=re.escape(f"{path}:1: ")) as error:
        read(run_dir)
    assert problem in str(error.value) and len(str(error.value)) < 400


def test_memory_is_bounded(run_dir, monkeypatch):
    monkeypatch.setattr(run_files, "MAX_NUMBERS", 30)  # of 15 a line
    with pytest.raises(ValueError, match=r"telemetry.jsonl:3: more than 30 numbers.*keep every tenth line"):
        read(run_dir)


def test_files_that_are_not_of_this_run_are_refused(run_dir, tmp_path, capsys):
    with pytest.raises(ValueError, match="telemetry.jsonl: No such file.*--hmoe-run-dir"):
        read(tmp_path)
    (tmp_path / run_files.TELEMETRY_FILE).mkdir()
    with pytest.raises(ValueError, match="not a regular file"):
        read(tmp_path)
    plan = PlacementPlan(records()[1].layers[:1])
    plan.save(run_dir / run_files.PLAN_FILE)
    with pytest.raises(ValueError, match=r"placement_plan.json: .*\[\(1, 4\)\].*has \(2, 4\).*different runs"):
        read(run_dir)
    (run_dir / run_files.PLAN_FILE).write_text("{}")
    assert run_report.main([str(run_dir)]) == 2
    assert re.search("run_report: .*placement_plan.json: .*missing.*leaves the widths out", capsys.readouterr().err)
    assert not (run_dir / "report.html").exists()
    (run_dir / run_files.PLAN_FILE).unlink()
    events = next((run_dir / "tensorboard").iterdir())
    events.write_bytes(events.read_bytes()[:-9])  # a killed run: what is whole before stays
    assert run_report.main([str(run_dir), "--png", str(tmp_path / "pngs")]) == 0
    assert [path.name for path in sorted((tmp_path / "pngs").iterdir())] == sorted(PICTURES)


CHANGES = [
    {"iteration": 10, "layers": [0], "bytes": 2e6, "seconds": 0.5, "balance_before": 1.3, "balance_after": 1.01},
    {"iteration": 20, "layers": [0, 2], "bytes": 1e6, "seconds": 0.25, "balance_before": 1.1, "balance_after": 1.02},
]


def test_changes_of_plan_are_drawn_and_counted(run_dir):
    from hmoe_megatron.tools.report import run_page, training_pictures

    (run_dir / run_files.REPLANS_FILE).write_text("".join(json.dumps(change) + "\n" for change in CHANGES))
    run = read(run_dir)
    assert run.changes == CHANGES
    (axes,) = training_pictures.rank_balance(run).axes
    lines = [line.get_xdata() for line in axes.lines if len(set(line.get_xdata())) == 1]
    assert [places[0] for places in lines] == [10, 20]
    assert run_page._facts(run)["experts moved"] == "2 times, 3.0 MB in 0.8 s; slowest rank over mean 1.30 → 1.02"
    assert "experts moved" not in run_page._facts(replace(run, changes=[]))


@pytest.mark.parametrize("change", [{"bytes": -1}, {"seconds": "1"}, {"balance_after": 1e9}, {"iteration": 1.5}])
def test_changes_of_plan_are_untrusted(run_dir, change):
    path = run_dir / run_files.REPLANS_FILE
    path.write_text(json.dumps(CHANGES[0]) + "\n" + json.dumps(CHANGES[1] | change) + "\n")
    with pytest.raises(ValueError, match=re.escape(f"{path}:2: ")):
        read(run_dir)
