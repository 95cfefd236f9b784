"""The same through torchrun: two runs into one directory, SIGTERM to the launcher."""

import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from hmoe_megatron.checkpoint import directory, manifest
from hmoe_megatron.checkpoint.lock import LOCK_FILE
from tests.distributed.training_run import TINY
from tests.faults.harness import MODEL

ROOT = Path(__file__).parents[2]
START_S, END_S = 300, 90


def start(root, log):
    flags = [*TINY, *MODEL, "--train-iters", "100000", "--save", root, "--load", root]
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "pretrain_hmoe.py"]
    return subprocess.Popen(list(map(str, words + flags)), cwd=ROOT, stdout=log.open("w"), stderr=subprocess.STDOUT)


def wait_for(path, launcher):
    deadline_s = time.monotonic() + START_S
    while not path.exists():
        assert launcher.poll() is None and time.monotonic() < deadline_s
        time.sleep(0.2)


@pytest.mark.slow
@pytest.mark.campaign
def test_two_runs_into_one_directory_then_sigterm(tmp_path, told):
    root = tmp_path / "run"
    first = start(root, tmp_path / "first.log")
    try:
        wait_for(root / LOCK_FILE, first)
        second = start(root, tmp_path / "second.log")
        assert second.wait(START_S) != 0
        said = re.findall("pretrain_hmoe.py: error: (.*)", (tmp_path / "second.log").read_text())
        assert len(said) == 1 and f"--save {root} is in use by process" in said[0]
        assert "exitcode  : 5" in (tmp_path / "second.log").read_text()
        told("two runs into one directory (torchrun)", 1, "the second ends with exit code 5 and names the process")

        wait_for(root / directory.TRACKER_FILE, first)
        ranks = psutil.Process(first.pid).children(recursive=True)
        first.send_signal(signal.SIGTERM)
        first.wait(END_S)
        assert psutil.wait_procs(ranks, timeout=END_S)[1] == []
        text = (tmp_path / "first.log").read_text()
        assert "exiting program after receiving SIGTERM" in text
        last = max(map(int, re.findall(r" iteration +(\d+)/", text)))
        tracked = directory.read_tracker(root)
        assert tracked == last
        path = directory.checkpoint_path(root, tracked)
        assert manifest.damaged_files(path, manifest.load_manifest(path).files) == []
        told("SIGTERM to torchrun", 1, "all ranks saved the step that they were in, and ended")
    finally:
        for process in psutil.Process(first.pid).children(recursive=True) if first.poll() is None else []:
            process.kill()
        first.kill()
