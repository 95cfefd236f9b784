"""tools/plan_placement.py: every source of models and loads, what it prints and writes, and what it refuses."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread

from hmoe_megatron.files import PLAN_FILE, RUN_ARGUMENTS_FILE, TELEMETRY_FILE
from hmoe_megatron.placement import PROFILES, CostModel, PlacementPlan, contiguous_plan, nodes_of, plan_model
from hmoe_megatron.placement.moves import diff
from hmoe_megatron.tools import plan_placement
from hmoe_megatron.tools.plan_tool import picture
from hmoe_megatron.tools.plan_tool.model import model_of
from hmoe_megatron.widths import layer_widths

LAYERS, EXPERTS, RANKS, TOTAL = 3, 8, 4, 2048
MODEL = [
    "--num-layers",
    "3",
    "--num-experts",
    "8",
    "--hmoe-total-width",
    "2048",
    "--expert-model-parallel-size",
    "4",
    "--hidden-size",
    "64",
    "--seq-length",
    "128",
]
WIDTHS = layer_widths("arithmetic:9:23", LAYERS, EXPERTS, TOTAL)


def call(capsys, *words):
    """(exit status, standard output, standard error)."""
    status = plan_placement.main([str(word) for word in words])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def planned(capsys, *words):
    status, out, err = call(capsys, *words, "--json")
    assert status == 0, err
    return json.loads(out)


def tokens_of(result):
    return [layer["tokens"] for layer in result["plan"]["layers"]]


def telemetry_line(iteration, shares_LE, experts_per_token=2.0):
    layers = [
        {
            "layer": n,
            "token_share": share,
            "flops_share": share,
            "experts_per_token": experts_per_token,
            "activated_expert_parameters": 1.0,
            "flops_balance": 1.0,
            "token_balance": 1.0,
        }
        for n, share in enumerate(shares_LE)
    ]
    return (
        json.dumps(
            {
                "iteration": iteration,
                "activated_parameters": 1.0,
                "total_parameters": 1,
                "layers": layers,
                "flops_balance": 1.0,
                "token_balance": 1.0,
                "time_balance": 1.0,
                "expert_time_ms": [1.0],
                "experts_without_token": [],
            }
        )
        + "\n"
    )


@pytest.fixture
def run_dir(tmp_path):
    """A run whose first expert takes half of all rows in its last two logged steps."""
    (tmp_path / RUN_ARGUMENTS_FILE).write_text(json.dumps([*MODEL, "--swiglu", "--train-iters", "7"]))
    even, hot = [[1 / 8] * 8] * LAYERS, [[0.5, *[0.5 / 7] * 7]] * LAYERS
    (tmp_path / TELEMETRY_FILE).write_text(
        "".join(telemetry_line(10 * n, shares) for n, shares in enumerate([even, even, hot, hot], 1))
    )
    plan_model(None, WIDTHS, RANKS).save(tmp_path / PLAN_FILE)
    return tmp_path


def test_flags_alone_and_what_is_printed(capsys):
    status, out, err = call(capsys, *MODEL, "--compare")
    assert (status, err) == (0, "")
    assert max(map(len, out.splitlines())) <= 100
    for words in (
        "profile: flops",
        "none measured",
        "layers 0-2",
        "rank  pieces",
        "max over mean of FLOPs",
        "contiguous",
        "EPLB, by tokens x width",
        "planned",
        "slowest rank over the mean, by layer:",
    ):
        assert words in out, words


def test_equal_loads_are_the_rows_of_a_micro_batch(capsys):
    result = planned(capsys, *MODEL, "--micro-batch-size", 3)
    assert tokens_of(result) == [[RANKS * 3 * 128 * 2 / 8] * 8] * LAYERS
    assert result["unit"] == "FLOPs" and result["plan"]["cost"]["hidden_size"] == 64


def test_the_comparison_is_what_it_says(capsys):
    result = planned(capsys, *MODEL, "--num-layers", 1)
    widths = WIDTHS[0]
    in_order = [sum(widths[2 * r : 2 * r + 2]) for r in range(RANKS)]
    compared = result["compared"]
    assert compared["contiguous"]["over_mean"] == pytest.approx(max(in_order) * RANKS / TOTAL)
    assert compared["contiguous"]["gap"] == pytest.approx(max(in_order) * RANKS / TOTAL - 1)
    assert list(compared)[-1] == "planned"
    assert compared["planned"]["time"] == min(outcome["time"] for outcome in compared.values())


def test_flags_given_win_over_the_file(capsys, tmp_path):
    (tmp_path / "model.args").write_text(
        "\n".join(
            [
                "--num-layers 3",
                "--num-experts 8",
                "--hmoe-total-width 2048",
                "--expert-model-parallel-size 4",
                "--lr 1e-4",
                "--swiglu",
            ]
        )
    )
    result = planned(capsys, "--args", tmp_path / "model.args", "--expert-model-parallel-size", 2)
    assert len(result["plan"]["ranks"]) == 2
    assert [layer["widths"] for layer in result["plan"]["layers"]] == list(map(list, WIDTHS))


@pytest.mark.parametrize("last, hot", [(2, 0.5), (4, (0.5 + 1 / 8) / 2), (1000, (0.5 + 1 / 8) / 2)])
def test_a_run_gives_flags_plan_and_loads(capsys, run_dir, last, hot):
    result = planned(capsys, "--run", run_dir, "--last", last)
    rows = RANKS * 128 * 2.0
    for tokens in tokens_of(result):
        assert tokens[0] == pytest.approx(rows * hot) and sum(tokens) == pytest.approx(rows)
    compared = result["compared"]
    assert compared["planned"]["time"] < compared["old plan"]["time"]
    old, new = (
        PlacementPlan.load(run_dir / PLAN_FILE, WIDTHS, RANKS),
        PlacementPlan.from_json(json.dumps(result["plan"])),
    )
    assert result["moves"] == [vars(move) for move in diff(old, new)] and result["moves"]


def test_a_run_killed_before_its_first_log_and_one_without_a_plan(capsys, run_dir):
    (run_dir / TELEMETRY_FILE).unlink()
    (run_dir / PLAN_FILE).unlink()
    result = planned(capsys, "--run", run_dir)
    assert "moves" not in result and any("none measured" in note for note in result["notes"])


def test_counts_of_any_trainer(capsys, tmp_path):
    counts_TLE = np.random.default_rng(0).integers(0, 100, (5, LAYERS, EXPERTS))
    lines = "".join(json.dumps({"tokens": counts.tolist()}) + "\n" for counts in counts_TLE)
    (tmp_path / "counts.jsonl").write_text(lines)
    result = planned(capsys, *MODEL, "--loads", tmp_path / "counts.jsonl", "--last", 3)
    assert tokens_of(result) == counts_TLE[2:].mean(axis=0).tolist()


def test_counts_as_files_really_are(capsys, tmp_path):
    """A byte-order mark, a space after the brace, a blank line, and an end that a killed trainer left."""
    line = json.dumps({"tokens": [[5.0] * EXPERTS] * LAYERS}).replace("{", "{ ")
    (tmp_path / "counts.jsonl").write_text(f"\ufeff{line}\n\n{line}\n{line[:40]}")
    result = planned(capsys, *MODEL, "--loads", tmp_path / "counts.jsonl")
    assert tokens_of(result) == [[5.0] * EXPERTS] * LAYERS
    assert "last 2 lines" in str(result["notes"]) and "in the middle of line 4" in str(result["notes"])


def test_experts_per_token_are_measured_too(capsys, tmp_path):
    (tmp_path / "t.jsonl").write_text(telemetry_line(1, [[1 / 8] * 8] * LAYERS, experts_per_token=3.0))
    result = planned(
        capsys,
        *MODEL,
        "--loads",
        tmp_path / "t.jsonl",
        "--tensor-model-parallel-size",
        2,
        "--expert-tensor-parallel-size",
        1,
    )
    assert sum(tokens_of(result)[0]) == pytest.approx(RANKS * 128 / 2 * 3)


def test_pieces_divide_among_the_gpus_of_a_rank(capsys):
    result = planned(
        capsys, *MODEL, "--expert-model-parallel-size", 8, "--expert-tensor-parallel-size", 2, "--hmoe-cut-multiple", 8
    )
    inner = [lo for layer in result["plan"]["layers"] for rank in layer["pieces"] for _, lo, _ in rank if lo]
    assert inner and all(lo % 16 == 0 for lo in inner) and any(lo % 32 for lo in inner)


def test_the_machine(capsys):
    result = planned(
        capsys,
        *MODEL,
        "--profile",
        "h100",
        "--nodes",
        2,
        "--speeds",
        "1,1,2,2",
        "--gib",
        3,
        "--expert-tensor-parallel-size",
        2,
        "--expert-data-parallel-size",
        8,
    )
    cap = 2 * 3 * 2**30
    assert result["plan"]["ranks"] == [[0, 2.0, cap], [0, 2.0, cap], [1, 4.0, cap], [1, 4.0, cap]]
    assert result["unit"] == "s" and result["plan"]["cost"]["expert_data_parallel_size"] == 8
    assert all(lo % 32 == 0 for layer in result["plan"]["layers"] for rank in layer["pieces"] for _, lo, _ in rank)


def test_pipeline_stages_and_layers_without_experts(capsys):
    result = planned(
        capsys, *MODEL, "--num-layers", 4, "--pipeline-model-parallel-size", 2, "--moe-layer-freq", "[0,1,1,1]"
    )
    assert result["plan"]["stages"] == [0, 1, 1] and result["plan"]["cost"]["live_micro_batches"] == 2
    assert result["plan"]["numbers"] == [1, 2, 3]
    more = model_of(
        [], [*map(str, MODEL), *"--num-layers 4 --pipeline-model-parallel-size 2 --mtp-num-layers 2".split()]
    )
    assert more.layers == (0, 1, 2, 3, 4, 5) and more.stages == (0, 0, 1, 1, 1, 1), "they are with the last stage"
    assert model_of([], [*MODEL, "--recompute-granularity", "full"]).live_micro_batches == 0


@pytest.mark.parametrize(
    ("pattern", "layers"),
    [
        ("([0]*3+[1]*5)", range(3, 8)),
        ("2*[0,1]+[1]*4", [1, 3, 4, 5, 6, 7]),
        ("([1]*3+[0])*2", [0, 1, 2, 4, 5, 6]),
        ("2", [0, 2, 4, 6]),
    ],
)
def test_layers_of_a_pattern_are_those_of_megatron(pattern, layers):
    from megatron.training.arguments import moe_freq_type

    model = model_of([*map(str, MODEL), "--num-layers", "8", f"--moe-layer-freq={pattern}"], [])
    assert model.layers == tuple(layers)
    stock = moe_freq_type(pattern)
    assert model.layers == tuple(n for n in range(8) if (n % stock == 0 if isinstance(stock, int) else stock[n]))


def test_layers_are_numbered_as_the_decoders(capsys, tmp_path):
    model = [*map(str, MODEL), "--num-layers", "4", "--moe-layer-freq", "[0,0,1,1]"]
    assert plan_placement.main([*model, "--compare", "--output", str(tmp_path / "plan.json")]) == 0
    text = capsys.readouterr().out
    assert "layers 2-3: " in text and "layers 0-1" not in text
    assert re.findall(r"^ {6}(\d+) ", text.split("by layer:")[1], re.MULTILINE) == ["2", "3"]
    assert plan_placement.main([*model, "--layer", "3"]) == 0 and "layer 3: " in capsys.readouterr().out
    assert plan_placement.main([*model, "--layer", "1"]) == 2 and "the plan has layers 2-3" in capsys.readouterr().err
    moved = planned(capsys, *model, "--old-plan", tmp_path / "plan.json", "--speeds", "1,1,1,9")["moves"]
    assert moved and {move["layer"] for move in moved} <= {2, 3}
    capped = [*model, "--gib", "0.000001", "--hidden-size", "64"]
    assert plan_placement.main(capped) == 2 and "layers 2-3" in capsys.readouterr().err


def test_the_plan_it_writes_is_the_one_it_prints(capsys, tmp_path):
    result = planned(capsys, *MODEL, "--output", tmp_path / "plan.json")
    written = PlacementPlan.load(tmp_path / "plan.json", WIDTHS, RANKS)
    assert json.loads(written.to_json()) == result["plan"]
    again = planned(capsys, *MODEL, "--old-plan", tmp_path / "plan.json")
    assert again["moves"] == []


def bars(axes):
    """Height of each rank's bar."""
    tops = {}
    for bar in axes.patches:
        rank = round(bar.get_x() + bar.get_width() / 2)
        tops[rank] = max(tops.get(rank, 0), bar.get_y() + bar.get_height())
    return [tops.get(rank, 0) for rank in range(len(tops))]


@pytest.mark.parametrize("layer", [0, 1])
def test_what_the_picture_shows(layer):
    cost, ranks = CostModel(PROFILES["h100"], 1024), nodes_of(2, 2, bytes=3 << 30)
    tokens_LE = [[900.0] * EXPERTS, [2000.0, *[50.0] * (EXPERTS - 1)]]
    plans = {
        "before": contiguous_plan(WIDTHS[:2], ranks, tokens_LE, cost),
        "after": plan_model(tokens_LE, WIDTHS[:2], ranks, cost, cut_multiple=16),
    }
    figure = picture.plans_figure(plans, layer)
    axes = figure.axes[:4]
    for column, plan in enumerate(plans.values()):
        of = plan.layers[layer]
        slowest = max(of.predicted.time)
        scale = 1e3 if max(max(p.layers[layer].predicted.time) for p in plans.values()) >= 1e-3 else 1e6
        assert bars(axes[column]) == pytest.approx([time * scale for time in of.predicted.time])
        assert bars(axes[2 + column]) == pytest.approx([held / 2**30 for held in of.predicted.bytes])
        (mean,) = (line.get_ydata()[0] for line in axes[column].lines)
        assert mean == pytest.approx(sum(of.predicted.time) / 4 * scale)
        assert f"slowest over mean {slowest * scale / mean:.3f}, {of.cuts} cut" in axes[column].get_title()
        (caps,) = axes[2 + column].collections
        assert {y for segment in caps.get_segments() for _, y in segment} == {1.5}  # shared by two layers
        hatched = sum(bool(bar.get_hatch()) for bar in axes[column].patches)
        assert hatched == sum(p.width < of.widths[p.expert] for rank in of.pieces for p in rank)
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert ("piece of a cut expert" in labels) == any(plan.layers[layer].cuts for plan in plans.values())
    assert "cap of a rank / the 2 layers of the stage" in labels


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["--gib", "1"],
        ["--layer", "1", "--profile", "h100"],
        ["--expert-model-parallel-size", "64", "--num-experts", "512"],
    ],
)
def test_the_picture(capsys, tmp_path, words):
    status, out, err = call(capsys, *MODEL, *words, "--plot", tmp_path / "plan.png")
    assert status == 0, err
    assert f"written: {tmp_path / 'plan.png'}" in out
    height, width, _ = (pixels := imread(tmp_path / "plan.png")).shape
    assert 600 < height < 1600 and 1200 < width < 2400
    assert len(np.unique(pixels.reshape(-1, pixels.shape[2])[::97], axis=0)) > 10


@pytest.mark.parametrize(
    "words, message",
    [
        ([], "--num-experts and --expert-model-parallel-size: give the size"),
        ([*MODEL, "--nonsense", "3"], "--nonsense 3: not a flag"),
        ([*MODEL, "--num-layers", "three"], "--num-layers: invalid int value"),
        ([*MODEL, "--num-layers", "0"], "--num-layers 0: give a whole number"),
        ([*MODEL, "--moe-layer-freq", "[1]*3+[2]"], "give a number, or 0 and 1"),
        ([*MODEL, "--moe-layer-freq", "[1]*9**9"], "give a number, or 0 and 1"),
        ([*MODEL, "--moe-layer-freq", "[1]*99999*99999"], "give a number, or 0 and 1"),
        ([*MODEL, "--moe-layer-freq", "print(1)"], "give a number, or 0 and 1"),
        ([*MODEL, "--hmoe-max-cuts", "-1"], "--hmoe-max-cuts -1"),
        ([*MODEL, "--profile", "h1000"], "h1000"),
        ([*MODEL[:-4], "--profile", "h100"], "--hidden-size: --profile h100 predicts seconds"),
        ([*MODEL[:-4], "--gib", "3"], "--hidden-size: the bytes under --gib 3"),
        ([*MODEL, "--nodes", "3"], "--nodes 3: give a number that divides the 4 ranks"),
        ([*MODEL, "--speeds", "1,2"], "--speeds 1,2: give one number above 0, or 4 with commas"),
        ([*MODEL, "--gib", "0"], "--gib 0: give one number above 0"),
        ([*MODEL, "--gib", "0.0001"], "do not fit"),
        ([*MODEL, "--gib", "1e300"], "--gib 1e300: give one number above 0"),
        ([*MODEL, "--gib", ""], "--gib : give one number above 0"),
        ([*MODEL, "--last", "0"], "--last 0"),
        ([*MODEL, "--last", "1" + "0" * 30], "--last 1"),
        ([*MODEL, "--seq-length", "1" + "0" * 400], "--seq-length of over 300 digits: give a whole number"),
        ([*MODEL, "--expert-model-parallel-size", "100000000"], "--expert-model-parallel-size 100000000: give a whole"),
        ([*MODEL, "--moe-layer-freq", "[" * 100_000], "give a number, or 0 and 1"),
        ([*MODEL, "--hmoe-placement", "contiguous"], "--hmoe-placement: not a flag"),
        ([*MODEL, "--output", "/tmp"], "/tmp: a directory"),
        ([*MODEL, "--output", "same.file", "--plot", "same.file"], "give two files"),
        ([*MODEL, "--layer", "3"], "layer 3: the plan has layers 0-2"),
        ([*MODEL, "--output", "/dev/null/plan.json"], "--output /dev/null/plan.json: /dev/null is no directory"),
        ([*MODEL, "--old-plan", "/nowhere/plan.json"], "/nowhere/plan.json"),
        ([*MODEL, "--args", "/nowhere/x.args"], "/nowhere/x.args"),
        ([*MODEL, "--args", "a", "--run", "b"], "--args and --run: give one"),
        (["--run", "/nowhere"], "run_arguments.json is missing"),
        ([*MODEL, "--num-layers", "4", "--pipeline-model-parallel-size", "3"], "does not divide"),
    ],
)
def test_refusals(capsys, words, message):
    status, out, err = call(capsys, *words)
    assert status == 2 and out == "" and message in err


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "holds no step"),
        ("[]", "a list, not a JSON object"),
        ('{"tokens": 3}', ":1: not an object with lists"),
        ('{"tokens": [[1,2]], "more": 1}', ":1: not an object with lists"),
        ('{"tokens": [[1,2],[1,2],[1,2]]}', ":1: experts by layer [2, 2, 2], of the model [8, 8, 8]"),
        ('{"tokens": [' + ",".join(["[1,1,1,1,1,1,1,-1]"] * 3) + "]}", "a count is not a number from 0"),
        ('{"tokens": [' + ",".join(["[1,1,1,1,1,1,1,NaN]"] * 3) + "]}", "NaN is no number"),
        ('{"tokens": [' + ",".join(["[1,1,1,1,1,1,1,true]"] * 3) + "]}", "a count is not a number from 0"),
        ('{"tokens": ' + "[" * 100_000, "holds no whole line"),
        ('{"tokens": ' + "[" * 100_000 + "\n", ":1: a line of counts: nested too deeply"),
        (telemetry_line(1, [[1.0]] * 2), "2 MoE layers, the model has 3"),
        (telemetry_line(1, [[0.5, 0.5]] * 3), "experts of each layer [2, 2, 2], of the model [8, 8, 8]"),
    ],
)
def test_loads_that_are_none(capsys, tmp_path, text, message):
    (tmp_path / "loads.jsonl").write_text(text)
    status, out, err = call(capsys, *MODEL, "--loads", tmp_path / "loads.jsonl")
    assert status == 2 and out == "" and message in err and "loads.jsonl" in err


def test_the_model_is_the_one_training_builds():
    """The few flags read here mean what they mean to training."""
    model = model_of([], [*MODEL, "--hmoe-router", "topp", "--hmoe-top-p", "0.6", "--hmoe-cut-multiple", "8"])
    assert model.widths_LE == WIDTHS and model.cut_multiple == 8
    assert model.experts_per_token == pytest.approx((5.0,) * LAYERS)  # the fewest of 8 equal ones that reach 0.6


def test_the_example_in_the_help_runs(capsys):
    lines = re.findall(r"python tools/plan_placement.py (--num-experts .*)", plan_placement.__doc__)
    assert len(lines) == 1 and call(capsys, *lines[0].split())[0] == 0


def test_the_readme_shows_what_its_command_prints(capsys):
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    command = re.search(r"python tools/plan_placement.py (.*)", readme)[1]
    status, out, _ = call(capsys, *command.split())
    assert status == 0 and out[out.index("layer 0") :] in readme


def test_the_help_names_every_profile(capsys):
    with pytest.raises(SystemExit):
        plan_placement.main(["--help"])
    assert f"{', '.join(PROFILES)}," in " ".join(capsys.readouterr().out.split())
