"""What `make gpu` does, as tests: the same functions on a real GPU, and a whole command."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.duel import Side
from benchmarks.gpu.correctness import CASES, DTYPES, KINDS, in_a_graph, random_case, worst_of
from benchmarks.gpu.runs import MODEL, RUNS, lacking, verdict
from hmoe_megatron.machine.optional import kernels
from hmoe_megatron.tools.report.scalars import read_scalars

ROOT = Path(__file__).parents[2]
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_named_cases(dtype):
    found = worst_of(CASES, dtype, seed=0)
    assert not found["failed"] and not found["different in a second run"], found


@pytest.mark.parametrize("kind", range(KINDS))
def test_random_cases(kind):
    import random

    draw = random.Random(kind)
    found = worst_of({str(number): random_case(draw, kind) for number in range(5)}, torch.bfloat16, seed=kind)
    assert not found["failed"] and not found["different in a second run"], found


def test_a_cuda_graph_gives_the_same_for_other_rows():
    assert in_a_graph(CASES["widest first, one without rows"])["failed"] == []


def test_experts_are_drawn_from_seed_layer_and_expert_only():
    from types import SimpleNamespace

    from hmoe_megatron.moe.experts import initial_weights

    config = SimpleNamespace(
        hidden_size=512, init_method=torch.nn.init.normal_, output_layer_init_method=torch.nn.init.normal_
    )
    device = torch.device("cuda", torch.cuda.current_device())
    before = torch.cuda.get_rng_state()
    first = initial_weights(config, 1, 0, 3, 640, device)
    assert torch.equal(torch.cuda.get_rng_state(), before), "no stream of the rank moves"
    torch.cuda.manual_seed(77)
    again, other = (initial_weights(config, 1, 0, expert, 640, device) for expert in (3, 4))
    assert all(map(torch.equal, first, again)) and not torch.equal(first[0], other[0])


@pytest.fixture(scope="module")
def servers(tmp_path_factory):
    """(ranks) -> the processes that do all runs of as many GPUs."""
    started = {}

    def of(ranks):
        if ranks not in started:
            log = tmp_path_factory.mktemp("runs") / f"{ranks}.log"
            started[ranks] = Side(f"runs on {ranks}", "serve", "", log, ranks, "benchmarks.gpu.runs")
            started[ranks].ready()
        return started[ranks]

    yield of
    for side in started.values():
        side.__exit__()


@pytest.mark.parametrize("run", RUNS, ids=lambda run: run.name)
def test_training_run(servers, run):
    engine = bool(kernels().engine)
    if why := lacking(run, torch.cuda.device_count(), torch.cuda.get_device_capability(), engine):
        pytest.skip(why)
    side = servers(run.gpus)
    found = side.ask("run", flags=run.flags, resume=run.resume)
    again = {"again": True} if run.against == run.flags else {}
    against = None if run.against is None else side.ask("run", flags=run.against, **again)
    said = verdict(run, found, against)
    assert said["ok"], said


def test_a_whole_command_goes_on_from_its_checkpoint(tmp_path):
    def train(steps):
        command = [
            sys.executable,
            ROOT / "pretrain_hmoe.py",
            *MODEL.split(),
            "--bf16",
            "--train-iters",
            steps,
            "--save",
            tmp_path,
            "--load",
            tmp_path,
            "--save-interval",
            3,
            "--override-opt_param-scheduler",
            "--tensorboard-dir",
            tmp_path / "tensorboard",
        ]
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    assert " experts computed by triton, checked on this device" in train(3)
    assert "successfully loaded checkpoint" in train(5)
    assert read_scalars(tmp_path / "tensorboard", [])["lm loss"].x.tolist() == [1, 2, 3, 4, 5]
