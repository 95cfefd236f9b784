"""Command lines that can't work, as the entry point sees them: the message names flag, value and remedy."""

import pytest

from tests.distributed.plans import save_plan, whole
from tests.distributed.ranks import run_ranks
from tests.distributed.training_run import TINY

WIDTHS = "--hmoe-widths 16,32,48,64"


TORCHRUN = "torchrun --nproc-per-node 8 pretrain_hmoe.py"


def refusals(of):
    return {flags: refusal(flags) for flags in of}


def refusal(flags):
    """What parse_arguments says of TINY and ``flags``; None if it takes them."""
    from hmoe_megatron.training import parse_arguments

    try:
        parse_arguments([*TINY, *flags.split()])
    except ValueError as error:
        return str(error)
    return None


CASES = [
    ("--hmoe-widths cubic:3 --hmoe-total-width 160", ["--hmoe-widths 'cubic:3'", "arithmetic:FIRST:LAST"]),
    ("--hmoe-widths arithmetic:9:23", ["--hmoe-total-width"]),
    ("--hmoe-widths 1,2,3", ["--hmoe-widths", "--num-experts 4"]),
    ("--hmoe-widths equal --hmoe-total-width 130 --hmoe-width-multiple 4", ["--hmoe-width-multiple 4"]),
    (f"{WIDTHS} --hmoe-router topp", ["--hmoe-router topp needs --hmoe-top-p"]),
    (f"{WIDTHS} --hmoe-router topp --hmoe-top-p 0.6 --moe-aux-loss-coeff 0.1", ["use --hmoe-load-balance-coeff"]),
    (
        f"{WIDTHS} --mtp-num-layers 1 --recompute-granularity full --recompute-method uniform --recompute-num-layers 2",
        ["--mtp-num-layers with --recompute-num-layers 2", "use --recompute-num-layers 1"],
    ),
    (
        f"{WIDTHS} --moe-ffn-hidden-size 64",
        ["add up to 160, but --hmoe-total-width 256", "times --moe-ffn-hidden-size"],
    ),
    (f"{WIDTHS} --optimizer muon", ["--optimizer", "use adam, sgd or lion"]),
    (
        f"{WIDTHS} --heterogeneous-layers-config-path a.json --ckpt-convert-format torch",
        ["--heterogeneous-layers-config-path", "--ckpt-convert-format"],
    ),
    (f"{WIDTHS} --transformer-impl transformer_engine", ["transformer_engine: this machine has no GPU"]),
    (f"{WIDTHS} --moe-layer-freq [0,0]", ["--moe-layer-freq [0, 0]: no layer has experts"]),
    (f"{WIDTHS} --moe-layer-freq [0,1,1]", ["names 3 layers, --num-layers is 2"]),
    (f"{WIDTHS} --hmoe-placement nowhere.json", ["nowhere.json", "No such file"]),
    (f"{WIDTHS} --hmoe-max-cuts -1", ["--hmoe-max-cuts -1: give 0 or more"]),
    (f"{WIDTHS} --moe-router-topk 5", ["--moe-router-topk 5 exceeds --num-experts 4"]),
    (f"{WIDTHS} --spec nowhere layer", ["--spec nowhere layer: No module named 'nowhere'", "give a module"]),
    (f"{WIDTHS} --spec tests.distributed.own_specs other", ["has no attribute 'other'"]),
    (f"{WIDTHS} --spec local", ["--spec local: not enough values"]),
    (f"{WIDTHS} --sft", ["--sft with --tokenizer-type, --mock-data: it reads conversations"]),
    (f"{WIDTHS} --mtp-num-layers 1 --perform-rl-step", ["--perform-rl-step is read by nothing here"]),
    (f"{WIDTHS} --ckpt-format torch", ["--ckpt-format", "use torch_dist"]),
    (f"{WIDTHS} --moe-router-score-function sigmoid", ["--moe-router-score-function", "--hmoe-p-penalty-coeff 0"]),
    (f"{WIDTHS} --async-save", ["--async-save without --use-persistent-ckpt-worker"]),
    (
        f"{WIDTHS} --async-save --use-persistent-ckpt-worker --async-strategy nvrx",
        ["--async-strategy nvrx: this machine has no GPU", "use mcore"],
    ),
    (
        f"{WIDTHS} --expert-model-parallel-size 8",
        ["--expert-model-parallel-size 8 needs 8 ranks", "there is one", TORCHRUN],
    ),
    (f"{WIDTHS} --tensor-model-parallel-size 2 --pipeline-model-parallel-size 2", ["needs 4 ranks or a multiple"]),
    (f"{WIDTHS} --tensor-model-parallel-size 2", ["without --sequence-parallel"]),
    (f"{WIDTHS} --expert-tensor-parallel-size 3", ["--expert-tensor-parallel-size 3 needs 3 ranks"]),
    (f"{WIDTHS} --train-iters -3", ["--train-iters -3: give a number of at least 1"]),
    (f"{WIDTHS} --lr=-1e-3 --micro-batch-size 0", ["--lr -0.001: give a number above 0", "--micro-batch-size 0: give"]),
    (f"{WIDTHS} --lr nan", ["--lr nan: give a number above 0"]),
    (f"{WIDTHS} --min-lr 1", ["--min-lr 1.0 is above --lr 0.01"]),
    (f"{WIDTHS} --lr-warmup-iters 100", ["--lr-warmup-iters 100 is not below the 100 iters of the decay"]),
    (f"{WIDTHS} --lr-warmup-iters 9 --lr-decay-iters 9", ["--lr-warmup-iters 9 is not below the 9 iters"]),
    (f"{WIDTHS} --lr-warmup-init 1", ["--lr-warmup-init 1.0 is above --lr 0.01"]),
    (f"{WIDTHS} --save nowhere", ["--save without --save-interval"]),
    (
        f"{WIDTHS} --rampup-batch-size 8 8 100",
        ["--rampup-batch-size is read by nothing: use --step-batch-size-schedule"],
    ),
    (f"{WIDTHS} --eval-iters -1", ["--eval-iters -1: give a number of at least 0"]),
]


@pytest.fixture(scope="module")
def said():
    """{flags: what is said of them}."""
    return run_ranks(1, refusals, [flags for flags, _ in CASES])[0]


@pytest.mark.parametrize(("flags", "messages"), CASES, ids=[flags.removeprefix(f"{WIDTHS} ") for flags, _ in CASES])
def test_refused(said, flags, messages):
    assert said[flags] is not None
    for message in messages:
        assert message in said[flags]


def test_a_sequence_that_tensor_parallelism_does_not_cut():
    flags = f"{WIDTHS} --tensor-model-parallel-size 2 --seq-length 31 --max-position-embeddings 31"
    assert "--seq-length 31 does not divide" in run_ranks(2, refusal, f"{flags} --sequence-parallel")[0]


def test_the_same_flags_without_the_mistake_are_taken():
    assert run_ranks(1, refusal, WIDTHS) == [None]
    assert run_ranks(1, refusal, f"{WIDTHS} --hmoe-router topp --hmoe-top-p 0.6") == [None]


def test_pieces_that_do_not_divide_by_the_expert_tensor_parallel_size():
    layout = "--tensor-model-parallel-size 2 --sequence-parallel"
    said = run_ranks(2, refusal, f"--hmoe-widths 16,33,48,64 --hmoe-placement contiguous {layout}")
    assert "expert 1 [0:33) has width 33" in said[0] and "--hmoe-width-multiple 2" in said[0]


def test_a_plan_of_another_size_or_other_widths(tmp_path):
    plan = save_plan(tmp_path / "plan.json", *[whole((0, 1), (2, 3))] * 2)
    (said,) = run_ranks(1, refusal, f"{WIDTHS} --hmoe-placement {plan}")
    assert plan in said and "2" in said and "1" in said
    said = run_ranks(2, refusal, f"--hmoe-widths 16,32,48,80 --expert-model-parallel-size 2 --hmoe-placement {plan}")
    assert plan in said[0] and "80" in said[0]
