"""A run on a GPU goes on from its checkpoint, with Megatron's own Adam and with Transformer Engine's."""

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hmoe_megatron.report.scalars import read_scalars
from tests.distributed.training_run import TINY

PRETRAIN = Path(__file__).parents[2] / "pretrain_hmoe.py"
WITHOUT_FUSED_KERNELS = "--no-gradient-accumulation-fusion --no-persist-layer-norm"
STEPS, SAVED = 6, 3
OPTIMIZERS = {
    "fp32": "",
    "bf16": "--bf16",
    "distributed, many buckets": "--bf16 --use-distributed-optimizer --overlap-grad-reduce --ddp-bucket-size 1",
    "asynchronous": "--bf16 --async-save --use-persistent-ckpt-worker --async-strategy mcore",
}
# GPU kernels that add with atomics give other last digits in every run.
# Not yet measured on a GPU.
BOUND = 1e-3
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]


def losses(folder, flags):
    command = [sys.executable, PRETRAIN, *TINY, "--hmoe-widths", "64,128,192,128", *WITHOUT_FUSED_KERNELS.split(),
               *flags.split(), "--train-iters", STEPS, "--save", folder, "--load", folder, "--save-interval", SAVED,
               "--tensorboard-dir", folder / "tensorboard"]  # fmt: skip
    run = subprocess.run([str(word) for word in command], capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stderr[-3000:]
    scalar = read_scalars(folder / "tensorboard", [])["lm loss"]
    return dict(zip(scalar.x.tolist(), scalar.y.tolist(), strict=True))


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("transformer_impl", ["local", "transformer_engine"])
def test_a_resumed_run_goes_on(tmp_path, transformer_impl, optimizer):
    if transformer_impl == "transformer_engine" and not importlib.util.find_spec("transformer_engine_torch"):
        pytest.skip("needs Transformer Engine with its torch part")
    flags = f"--transformer-impl {transformer_impl} {OPTIMIZERS[optimizer]}"
    whole = losses(tmp_path / "whole", flags)
    name = f"iter_{SAVED:07}"
    shutil.copytree(tmp_path / "whole" / name, tmp_path / "resumed" / name)
    (tmp_path / "resumed" / "latest_checkpointed_iteration.txt").write_text(str(SAVED))
    resumed = losses(tmp_path / "resumed", flags)
    assert list(resumed) == list(range(SAVED + 1, STEPS + 1))
    assert resumed == pytest.approx({step: whole[step] for step in resumed}, rel=BOUND)
