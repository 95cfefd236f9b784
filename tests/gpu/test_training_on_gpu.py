"""The runs of runs.py, as whole commands on real GPUs with NCCL."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.gpu.runs import MODEL, RUNS

PRETRAIN = Path(__file__).parents[2] / "pretrain_hmoe.py"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]


def losses(gpus, flags):
    """Losses of the run's twenty steps."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(gpus), PRETRAIN,
               *MODEL.split(), *flags.split()]  # fmt: skip
    run = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stderr[-3000:]
    found = [float(loss) for loss in re.findall(r"lm loss: ([0-9.E+-]+)", run.stdout)]
    assert len(found) == 20 and all(loss == loss for loss in found)
    return found


def lacking(run) -> str | None:
    """What of this machine the run would need."""
    for module in run.needs:
        if not importlib.util.find_spec(module):
            return f"needs {module}"
    if torch.cuda.device_count() < run.gpus:
        return f"needs {run.gpus} GPUs, this machine has {torch.cuda.device_count()}"
    if torch.cuda.get_device_capability() < run.capability:
        return f"needs compute capability {run.capability}"
    return None


@pytest.mark.parametrize("run", RUNS, ids=lambda run: run.name)
def test_on_gpus(run):
    if why := lacking(run):
        pytest.skip(why)
    found = losses(run.gpus, run.flags)
    assert found[-1] < found[0]
    if run.against is not None:
        assert found == pytest.approx(losses(run.against_gpus, run.against), rel=run.bound)
