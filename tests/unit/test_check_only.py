"""--hmoe-check-only: a configuration for any machine is checked on this one."""

import os
import re
import time
from pathlib import Path

import pytest

from hmoe_megatron.flag_files import read_args
from tests.distributed.pretrain_run import start
from tests.distributed.ranks import run_alone, run_ranks
from tests.distributed.training_run import TINY

ROOT = Path(__file__).parents[2]
PAPER = ROOT / "examples" / "hmoe_0.4b" / "hmoe_topp.args"
DATA = "--data-path /not/here --split 98,1,1 --padded-vocab-size 32000 --tokenizer-model /not/here --save /not/here"


def checked(words):
    began_s = time.monotonic()
    return *start([*words, "--hmoe-check-only"]), time.monotonic() - began_s


def for_gpus(ranks, *more):
    words = [*read_args(PAPER), *DATA.split(), "--world-size", str(ranks), *more]
    code, said, wall_s = run_alone(checked, words, timeout_s=200)
    return code, said.splitlines(), wall_s


@pytest.mark.parametrize(("ranks", "most_s"), [(64, 15), (4096, 60)])
def test_a_configuration_for_gpus_is_checked_without_one(ranks, most_s):
    layout = f"--expert-model-parallel-size 8 --global-batch-size {max(ranks, 64) * 8} --micro-batch-size 1"
    code, lines, wall_s = for_gpus(ranks, *layout.split())
    assert code == 0, lines
    said = "\n".join(lines)
    assert "implementation transformer_engine" in said and "experts computed by triton, if it passes" in said
    assert "8 experts on 8 ranks" in said and "parameters: 417.30 M" in said
    assert f"{ranks} ranks: all that can be checked without them is in order, nothing was written" in said
    assert "the data is not on this machine" in said
    assert re.search(r"memory of the fullest rank, [\d.]+ GiB", said) and max(map(len, lines)) <= 160
    assert wall_s < most_s and not os.path.exists("/not")


def test_all_refusals_of_a_configuration_come_at_once():
    code, lines, _ = for_gpus(48, *"--expert-model-parallel-size 32 --lr -1 --rampup-batch-size 1 1 1 --swiglu".split())
    said = "\n".join(lines)
    assert code == 2 and "--lr -1.0: give a number above 0" in said
    assert "--expert-model-parallel-size 32 needs 32 ranks" in said and "--rampup-batch-size is read by nothing" in said


def test_the_number_of_ranks_is_a_number():
    code, said, _ = run_alone(checked, [*TINY, "--world-size", "many"])
    assert code == 2 and "--world-size many: give the number of ranks" in said


def held_and_said(flags):
    """(bytes of weights, gradients and optimizer state of this rank after a step, what is predicted for it)."""
    import torch
    from megatron.core import mpu

    from benchmarks.trainer import Trainer
    from hmoe_megatron.validate_args.memory import of_rank

    trainer = Trainer([*TINY, *flags.split()], False, batches=batches)
    trainer.step()
    parameters = [parameter for chunk in trainer.model for parameter in chunk.parameters()]
    weights = sum(parameter.nbytes for parameter in parameters)
    gradients = sum(parameter.main_grad.nbytes for parameter in parameters)
    states = 0
    for inner in trainer.optimizer.chained_optimizers:
        held = inner.optimizer.state.values()
        states += sum(
            value.nbytes
            for state in held
            for value in state.values()
            if isinstance(value, torch.Tensor) and value.dim()
        )
        if trainer.args.bf16:  # the fp32 weights are what the inner optimizer updates
            states += sum(p.nbytes for group in inner.optimizer.param_groups for p in group["params"])
    stage, rank = mpu.get_pipeline_model_parallel_rank(), mpu.get_expert_model_parallel_rank()
    return (weights, gradients, states), of_rank(trainer.args, trainer.layout, stage, rank)


def batches(args):
    from tests.distributed.training_run import _batches

    return _batches(args, 0)


@pytest.mark.parametrize(
    ("ranks", "flags", "bound"),
    [
        (1, "", 0),
        (2, "--expert-model-parallel-size 2 --bf16", 0),
        (2, "--pipeline-model-parallel-size 2 --qk-layernorm --add-qkv-bias", 0),
        (2, "--tensor-model-parallel-size 2 --sequence-parallel --moe-shared-expert-intermediate-size 24", 0),
        (2, "--expert-model-parallel-size 2 --bf16 --use-distributed-optimizer", 0.02),  # buckets end in padding
    ],
)
def test_what_does_not_change_in_a_step_is_predicted_exactly(ranks, flags, bound):
    given = f"--hmoe-widths 16,32,48,64 --make-vocab-size-divisible-by 1 {flags}"
    found = run_ranks(ranks, held_and_said, given)
    for held, predicted in found:
        assert held == pytest.approx(predicted[2:5], rel=bound, abs=0 if not bound else None)
