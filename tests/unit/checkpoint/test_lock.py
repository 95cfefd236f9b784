"""One run at a time saves into a directory, and a run that is gone locks nothing."""

import contextlib
import os
import signal
import subprocess
import sys
import time

import pytest

from hmoe_megatron.checkpoint.lock import hold
from hmoe_megatron.exits import DirectoryInUse

HOLDER = """
import os, sys, time
from hmoe_megatron.checkpoint.lock import hold
lock = hold(sys.argv[1])
if len(sys.argv) > 2 and os.fork() == 0:
    time.sleep(60)  # as a checkpoint writer or a data loader that outlives its rank
print("held", flush=True)
time.sleep(60)
"""


def start(root, *more):
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(root), *more], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    assert process.stdout.readline() == "held\n"
    return process


def end(process):
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()


def test_a_second_run_is_refused_and_told_who_holds_the_directory(tmp_path):
    holder = start(tmp_path)
    try:
        with pytest.raises(DirectoryInUse, match=f"{tmp_path} is in use by process {holder.pid} on .*another --save"):
            hold(tmp_path, wait_s=0.3)
        assert DirectoryInUse.exit_code == 5
    finally:
        end(holder)
    assert hold(tmp_path, wait_s=0.3) is not None


@pytest.mark.parametrize("more", [[], ["fork"]], ids=["", "with a child of its own that lives on"])
def test_a_killed_run_holds_nothing(tmp_path, more):
    holder = start(tmp_path, *more)
    holder.kill()
    holder.wait()
    try:
        started_s = time.monotonic()
        assert hold(tmp_path, wait_s=5) is not None
        assert time.monotonic() - started_s < 5
    finally:
        end(holder)


def test_a_file_system_without_locks(tmp_path, monkeypatch):
    def no_locks(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr("fcntl.lockf", no_locks)
    assert hold(tmp_path) is None
