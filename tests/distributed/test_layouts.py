"""Tensor, sequence, pipeline and expert-tensor parallel, bf16, and the distributed optimizer."""

import pytest
import torch

from tests.distributed.plans import cut, save_plan, whole
from tests.distributed.ranks import run_ranks
from tests.distributed.test_plans import MODEL, TOKENS
from tests.distributed.training_run import EQUAL, LAYERS, ONE_ULP, STOCK, logical_state, losses, steps

NO_LOSS = f"{EQUAL} --hmoe-p-penalty-coeff 0"
LAYOUTS = {
    "TP2 with sequence parallel": (2, "--tensor-model-parallel-size 2 --sequence-parallel"),
    "TP2 EP2, whole experts": (
        2, "--tensor-model-parallel-size 2 --sequence-parallel --expert-model-parallel-size 2 "
        "--expert-tensor-parallel-size 1"),
    "TP2, experts split too, alltoall": (
        4, "--tensor-model-parallel-size 2 --sequence-parallel --expert-model-parallel-size 2 "
        "--expert-tensor-parallel-size 2 --moe-token-dispatcher-type alltoall"),
    "PP2": (2, "--pipeline-model-parallel-size 2"),
    "virtual PP": (
        2, "--num-layers 4 --pipeline-model-parallel-size 2 --num-virtual-stages-per-pipeline-rank 2"),
    "PP2 EP2": (4, "--pipeline-model-parallel-size 2 --expert-model-parallel-size 2"),
    "bf16": (2, "--expert-model-parallel-size 2 --bf16"),
    "distributed optimizer": (2, "--expert-model-parallel-size 1 --use-distributed-optimizer"),
    "distributed optimizer, bf16, EP2": (
        4, "--expert-model-parallel-size 2 --use-distributed-optimizer --bf16 --moe-token-dispatcher-type alltoall"),
}  # fmt: skip
# bf16 keeps 8 bits: the cpu backend rounds an expert's output once, Megatron after every product. Of the loss.
BF16_BOUND = 2e-3
# Tensor parallelism sums halves of each product; over five steps.
TP_LOSS_BOUND = 1e-6


@pytest.mark.parametrize("layout", LAYOUTS)
def test_equal_widths_are_bitwise_megatrons_under(layout):
    world, flags = LAYOUTS[layout]
    stock = run_ranks(world, steps, f"{flags} {STOCK}", stock=True)
    ours = run_ranks(world, steps, f"{flags} {NO_LOSS} --hmoe-gemm-backend reference")
    assert losses(ours) == losses(stock)
    assert len(set(losses(stock))) == 5
    for own, theirs in zip(ours, stock, strict=True):
        assert own["grad_norms"] == theirs["grad_norms"]
        assert own["dense"].keys() == theirs["dense"].keys()
        assert [name for name, value in own["dense"].items() if not torch.equal(value, theirs["dense"][name])] == []
        assert own["experts"].keys() == theirs["experts"].keys()
        assert [key for key, value in own["experts"].items() if not torch.equal(value, theirs["experts"][key])] == []


def test_bf16_on_the_cpu_backend_agrees_as_far_as_bf16_goes():
    flags = f"--expert-model-parallel-size 2 --bf16 {NO_LOSS}"
    reference = run_ranks(2, steps, f"{flags} --hmoe-gemm-backend reference")
    cpu = run_ranks(2, steps, f"{flags} --hmoe-gemm-backend cpu")
    assert losses(cpu) == pytest.approx(losses(reference), rel=BF16_BOUND)


@pytest.mark.parametrize("router", ["", "--hmoe-router topp --hmoe-top-p 0.6"])
def test_unequal_widths_under_tensor_parallel_agree_with_one_rank(tmp_path, router):
    """--use-cpu-initialization draws dense weights whole, so that they do not depend on the layout."""
    flags = f"{MODEL} {router} --use-cpu-initialization --make-vocab-size-divisible-by 1 --hmoe-placement "
    one = run_ranks(1, steps, flags + save_plan(tmp_path / "one.json", *[whole((2, 0, 1, 3))] * 2))
    pieces = cut(((3, 0, 24), (0, 0, 16), (2, 0, 16)), ((1, 0, 32), (2, 16, 48), (3, 24, 64)))
    plan = save_plan(tmp_path / "four.json", *[pieces] * 2)
    four = run_ranks(
        4, steps, f"{flags}{plan} --tensor-model-parallel-size 2 --sequence-parallel --expert-model-parallel-size 2 "
        "--expert-tensor-parallel-size 2 --moe-token-dispatcher-type alltoall"
    )  # fmt: skip
    assert losses(four) == pytest.approx(losses(one), rel=TP_LOSS_BOUND)


def test_unequal_widths_under_pipeline_parallel_do_not_depend_on_the_plan(tmp_path):
    flags = f"{MODEL} --pipeline-model-parallel-size 2 --expert-model-parallel-size 2 --hmoe-placement "
    first = save_plan(tmp_path / "first.json", whole((0, 1), (2, 3)), whole((3,), (0, 1, 2)))
    second = save_plan(tmp_path / "second.json", whole((3, 2, 1), (0,)), cut(((0, 0, 16), (3, 0, 32)),
                       ((1, 0, 32), (2, 0, 48), (3, 32, 64))))  # fmt: skip
    runs = [run_ranks(4, steps, flags + plan, telemetry=True) for plan in (first, second)]
    for rank in runs[0]:  # layers of both pipeline stages, on every rank
        assert rank["counts"].sum(axis=1).tolist() == [5 * TOKENS * 2] * LAYERS
    assert losses(runs[0]) == pytest.approx(losses(runs[1]), rel=ONE_ULP)
    assert logical_state(runs[0]).keys() == logical_state(runs[1]).keys()
