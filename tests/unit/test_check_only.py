"""--hmoe-check-only: a configuration for any machine is checked on this one."""

import os
import re
import time
from pathlib import Path

import pytest

from hmoe_megatron.flag_files import read_args
from tests.distributed.pretrain_run import start
from tests.distributed.ranks import run_alone
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
    assert "8 experts on 8 ranks" in said
    # 12 layers of 3 x 1024 x 9216; five experts of 1152 reach p = 0.6 when all are equally likely.
    assert "417.30 M, of them 339.74 M in experts and 77.56 M outside; 289.89 M active in a token" in said
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
