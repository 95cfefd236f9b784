"""The demo's path in a small form, each step as a user runs it, and what users do wrong."""

import json
import re
import shutil
import subprocess
import sys
import time
import warnings
from pathlib import Path

import psutil
import pytest
import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.default_planner import _EmptyStateDictLoadPlanner
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict

from hmoe_megatron.placement.plan import PlacementPlan
from hmoe_megatron.tools import generate, preprocess_data
from hmoe_megatron.tools.report.scalars import read_scalars
from tests.distributed.pretrain_run import start
from tests.distributed.ranks import run_alone, run_ranks

ROOT = Path(__file__).parents[2]
VOCABULARY, DOCUMENTS, RANKS = 600, 40, 2
TINY = (
    "--num-layers 2 --hidden-size 32 --num-attention-heads 4 --seq-length 64 --max-position-embeddings 64 "
    "--position-embedding-type rope --swiglu --disable-bias-linear --normalization RMSNorm "
    "--untie-embeddings-and-output-weights --hidden-dropout 0 --attention-dropout 0 --num-experts 4 "
    "--hmoe-widths arithmetic:9:23 --hmoe-total-width 128 --hmoe-router topp --hmoe-top-p 0.6 "
    "--expert-model-parallel-size 2 --micro-batch-size 2 --global-batch-size 4 --lr 5e-3 --lr-decay-style constant "
    "--tokenizer-type SentencePieceTokenizer --log-interval 1 --eval-interval 3 --eval-iters 2 --seed 7"
).split()


def command(*words, code=0, timeout_s=300):
    """Run one command of the README; returns what it printed."""
    run = subprocess.run([str(word) for word in words], cwd=ROOT, capture_output=True, text=True, timeout=timeout_s)
    assert run.returncode == code, f"exit code {run.returncode}\n{run.stdout[-3000:]}\n{run.stderr[-3000:]}"
    return run.stdout + run.stderr


def tool(name, *words, **more):
    return command(sys.executable, f"tools/{name}.py", *words, **more)


def torchrun(*flags):
    return [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        str(RANKS),
        "pretrain_hmoe.py",
        *map(str, flags),
    ]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    tool("get_corpus", "shakespeare", "--output", folder)
    for name in ("train", "valid"):
        lines = (folder / f"shakespeare_{name}.jsonl").read_text().splitlines()[:DOCUMENTS]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    tool("train_tokenizer", "--input", folder / "train.jsonl", "--vocab-size", VOCABULARY, "--output", folder / "tok")
    for name in ("train", "valid"):
        words = [
            "--input",
            folder / f"{name}.jsonl",
            "--output-prefix",
            folder / name,
            "--append-eod",
            "--tokenizer-type",
            "SentencePieceTokenizer",
            "--tokenizer-model",
            folder / "tok.model",
        ]
        assert run_alone(preprocess_data.main, list(map(str, words)), timeout_s=120) == 0
    return folder


def flags(data, run, steps, *more):
    return [
        *TINY,
        "--train-data-path",
        data / "train_text_document",
        "--valid-data-path",
        data / "valid_text_document",
        "--tokenizer-model",
        data / "tok.model",
        "--save",
        run,
        "--tensorboard-dir",
        run / "tensorboard",
        "--train-iters",
        steps,
        "--save-interval",
        3,
        *more,
    ]


@pytest.fixture(scope="module")
def whole_run(data, tmp_path_factory):
    run = tmp_path_factory.mktemp("runs") / "whole"
    return run, command(*torchrun(*flags(data, run, 6, "--hmoe-verify-data")))


def test_training_prints_plan_losses_and_telemetry(whole_run):
    run, output = whole_run
    lines = output.splitlines()
    assert "parameters: 0.0" in output and "idle" in output and max(map(len, lines)) < 400
    assert next(number for number, line in enumerate(lines) if "experts on 2 ranks" in line) < 20
    assert len([line for line in lines if line.startswith(" step ") and "tokens/s" in line]) == 6
    assert "-- arguments --" not in output and "-- arguments --" in (run / "megatron.log").read_text()
    assert output.count(" data: SHA-256 of all files compared") == 1
    found = re.findall(r" step +\d+ \| validation loss ([0-9.]+)", output)
    losses = [float(loss) for loss in found]
    assert len(losses) >= 2 and losses[-1] < losses[0]
    records = [json.loads(line) for line in (run / "telemetry.jsonl").read_text().splitlines()]
    assert [record["iteration"] for record in records] == [1, 2, 3, 4, 5, 6]
    for record in records:
        assert len(record["expert_time_ms"]) == RANKS and min(record["expert_time_ms"]) > 0
        for layer in record["layers"]:
            assert sum(layer["token_share"]) == pytest.approx(1) and sum(layer["flops_share"]) == pytest.approx(1)
    scalars = read_scalars(run / "tensorboard", [])
    assert len(scalars["lm loss"].x) == 6 and {"p_penalty_loss", "router_entropy_loss"} <= scalars.keys()
    plan = PlacementPlan.from_json((run / "placement_plan.json").read_text(), ep_size=RANKS)
    assert [sum(widths) for widths in plan.widths] == [128, 128]


def test_a_resumed_run_goes_on_exactly(data, whole_run, tmp_path):
    run, _ = whole_run
    resumed = tmp_path / "resumed"
    shutil.copytree(run / "iter_0000003", resumed / "iter_0000003")
    (resumed / "latest_checkpointed_iteration.txt").write_text("3")
    ended = run_ranks(
        RANKS, start, list(map(str, flags(data, resumed, 6, "--load", resumed, "--num-workers", 0))), timeout_s=120
    )
    assert [code for code, _ in ended] == [0] * RANKS and ", step 3" in ended[0][1]
    expected, losses = (read_scalars(r / "tensorboard", [])["lm loss"] for r in (run, resumed))
    assert losses.x.tolist() == [4, 5, 6]
    assert losses.y.tolist() == expected.y[3:].tolist()


@pytest.mark.campaign
def test_asynchronous_saves_equal_synchronous_ones(data, whole_run, tmp_path):
    """Written by a worker beside the training loop, which imports the entry point again and ends with its rank."""
    run, _ = whole_run
    output = command(
        *torchrun(
            *flags(data, tmp_path, 6, "--async-save", "--use-persistent-ckpt-worker", "--hmoe-console", "megatron")
        )
    )
    assert output.count("scheduled an async checkpoint save") == 2
    assert (tmp_path / "latest_checkpointed_iteration.txt").read_text() == "6"
    for name in ("iter_0000003", "iter_0000006"):
        expected, found = tensors(run / name), tensors(tmp_path / name)
        assert found.keys() == expected.keys() and len(found) > 50
        assert [key for key in found if not torch.equal(found[key], expected[key])] == []
    assert not [process for process in psutil.process_iter(["cmdline"]) if str(tmp_path) in process.info["cmdline"]]


def tensors(checkpoint):
    """{key: tensor} of a checkpoint of this test's, read without Megatron."""
    state = {}
    with warnings.catch_warnings(action="ignore"):
        _load_state_dict(state, FileSystemReader(checkpoint), planner=_EmptyStateDictLoadPlanner(), no_dist=True)
    return {key: value for key, value in state.items() if isinstance(value, torch.Tensor)}


def test_generate_loads_any_layout_in_one_process(whole_run, tmp_path):
    run, _ = whole_run
    words = ["--load", str(run), "--prompt", "ROMEO", "--tokens", "80", "--output", str(tmp_path / "text")]
    assert run_alone(generate.main, words) == 0
    text = (tmp_path / "text").read_text()
    assert text.startswith("ROMEO") and len(text) > 10
    assert run_alone(generate.main, words) == 0
    assert (tmp_path / "text").read_text() == text, "the same seed must give the same text"


@pytest.mark.campaign
def test_a_killed_run_starts_again_from_its_last_checkpoint(data, tmp_path):
    run = tmp_path / "killed"
    launcher = subprocess.Popen(
        torchrun(*flags(data, run, 200, "--load", run)), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    tracker, deadline_s = run / "latest_checkpointed_iteration.txt", time.monotonic() + 240
    while not tracker.exists():
        assert time.monotonic() < deadline_s and launcher.poll() is None
        time.sleep(0.2)
    # The ranks have sessions of their own: killing the launcher would leave them running. It ends them when one dies.
    psutil.Process(launcher.pid).children()[0].kill()
    assert launcher.wait(timeout=60) != 0
    saved = int(tracker.read_text())
    output = command(*torchrun(*flags(data, run, saved + 3, "--load", run, "--override-opt_param-scheduler")))
    assert f", step {saved}" in output
    iterations = [json.loads(line)["iteration"] for line in (run / "telemetry.jsonl").read_text().splitlines()]
    assert iterations == list(range(1, saved + 4))


@pytest.mark.campaign
def test_help_shows_our_flags():
    output = command(sys.executable, "pretrain_hmoe.py", "--help-all")
    assert "--hmoe-p-penalty-coeff" in output and "--num-layers" in output


@pytest.mark.campaign
def test_no_flags_at_all_names_what_is_missing():
    output = command(sys.executable, "pretrain_hmoe.py", code=2)
    assert "--num-layers is missing" in output and "--num-experts is missing" in output


def test_data_of_another_tokenizer_is_refused_before_any_process_group_starts(data, tmp_path):
    (tmp_path / "other.model").write_bytes((data / "tok.model").read_bytes() + b"\0")
    words = flags(
        data, tmp_path / "run", 1, "--tokenizer-model", tmp_path / "other.model", "--expert-model-parallel-size", 1
    )
    code, output = run_alone(start, list(map(str, words)))
    assert code == 2
    assert "was made with --tokenizer-type SentencePieceTokenizer" in output and "Traceback" not in output
    assert "initializing torch distributed" not in output and not (tmp_path / "run").exists()


def test_a_wrong_flag_ends_before_any_process_group_starts():
    """The messages themselves: tests/distributed/test_refusals.py."""
    wrong = "--mock-data --tokenizer-model x --train-iters 1 --hmoe-top-p 1.5".split()
    code, output = run_alone(start, [*TINY, *wrong])
    assert code == 2
    assert "pretrain_hmoe.py: error: --hmoe-top-p 1.5: give a probability above 0, at most 1" in output
    assert "initializing torch distributed" not in output and "Traceback" not in output
