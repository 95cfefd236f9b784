"""The same command on a GPU, under both of Megatron's implementations."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.distributed.training_run import TINY

PRETRAIN = Path(__file__).parents[2] / "pretrain_hmoe.py"
WITHOUT_FUSED_KERNELS = "--no-gradient-accumulation-fusion --no-persist-layer-norm"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]


@pytest.mark.parametrize("flags", ["", "--bf16", "--hmoe-router topp --hmoe-top-p 0.6"])
@pytest.mark.parametrize("transformer_impl", ["local", "transformer_engine"])
def test_losses_fall(transformer_impl, flags):
    if transformer_impl == "transformer_engine" and not importlib.util.find_spec("transformer_engine_torch"):
        pytest.skip("needs Transformer Engine with its torch part")
    command = [sys.executable, PRETRAIN, *TINY, "--hmoe-widths", "64,128,192,128", *WITHOUT_FUSED_KERNELS.split(),
               "--transformer-impl", transformer_impl, *flags.split(), "--train-iters", "20"]  # fmt: skip
    run = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stderr[-3000:]
    losses = [float(loss) for loss in re.findall(r"lm loss: ([0-9.E+-]+)", run.stdout)]
    assert len(losses) == 20
    assert all(loss == loss for loss in losses) and losses[-1] < losses[0]
