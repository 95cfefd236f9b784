"""Whole training runs as commands, tiny ones on mock data, and what they log."""

import os
import re
import subprocess
import sys
from pathlib import Path

from tests.distributed.training_run import TINY

ROOT = Path(__file__).parents[2]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
FLAGS = [*TINY, *"--hmoe-widths 16,32,48,64 --expert-model-parallel-size 2".split()]
# Megatron prints the mean since its last line: of one step, but of two in the second step after a start.
STEP = re.compile(r" iteration +(\d+)/ .* lm loss: ([0-9.E+-]+) .* grad norm: ([0-9.]+)")


def start(*words, **environment):
    """A command of the project in the background, standard error with its output."""
    command = list(map(str, words))
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                            env=os.environ | {"PYTHONPATH": str(ROOT)} | environment)  # fmt: skip


def finish(process, code=0, timeout_s=240):
    """What it printed; its exit code must be ``code``."""
    output, _ = process.communicate(timeout=timeout_s)
    assert process.returncode == code, f"exit code {process.returncode}\n{output[-5000:]}"
    return output


def steps(output):
    """[(step, loss, gradient norm), ...] as printed."""
    return STEP.findall(output)
