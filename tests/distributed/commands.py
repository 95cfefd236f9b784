"""Whole training runs as commands, tiny ones on mock data, and what they log."""

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.distributed.training_run import TINY

ROOT = Path(__file__).parents[2]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
FLAGS = [*TINY, *"--hmoe-widths 16,32,48,64 --expert-model-parallel-size 2 --hmoe-console megatron".split()]
# Megatron prints the mean since its last line: of one step, but of two in the second step after a start.
STEP = re.compile(r" iteration +(\d+)/ .* lm loss: ([0-9.E+-]+) .* grad norm: ([0-9.]+)")


def start(*words, **environment):
    """A command of the project in the background. Its output goes to a file: of two that talk to each other one would
    wait for ever for the reader of a full pipe."""
    log = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115  lives as long as the process
    process = subprocess.Popen(
        list(map(str, words)),
        cwd=ROOT,
        stdout=log,
        stderr=subprocess.STDOUT,
        env=os.environ | {"PYTHONPATH": str(ROOT)} | environment,
    )
    process.log = log
    return process


def output(process):
    """What it printed so far."""
    process.log.seek(0)
    return process.log.read()


def finish(process, code=0, timeout_s=480):
    """What it printed; its exit code must be ``code``."""
    try:
        process.wait(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        process.terminate()
        raise TimeoutError(f"{process.args[:8]} still ran after {timeout_s} s\n{output(process)[-5000:]}") from None
    assert process.returncode == code, f"exit code {process.returncode}\n{output(process)[-5000:]}"
    return output(process)


def steps(text):
    """[(step, loss, gradient norm), ...] as printed."""
    return STEP.findall(text)
