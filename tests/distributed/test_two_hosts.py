"""Training over two hosts, a rank on each, experts over both; one is killed, and the run goes on where it was."""

import re
import shlex
import sys
import time

import psutil
import pytest

from tests.distributed.commands import FLAGS, TORCHRUN, finish, output, start, steps
from tests.distributed.hosts import ADDRESSES, assert_empty, no_hosts, two_hosts

pytestmark = [pytest.mark.slow, pytest.mark.campaign]
STEPS, SAVE_EVERY = 24, 4
WAIT_S = 480  # a start alone took 200 s on two cores that 50 processes wanted


@pytest.fixture(scope="module")
def hosts():
    if why := no_hosts():
        pytest.skip(why)
    with two_hosts() as both:
        yield both


@pytest.fixture(scope="module")
def by_c10d(hosts):
    """Steps of torchrun's own way to find the other host, as docs/launch.md has it."""
    words = f"--nnodes 2 --nproc-per-node 1 --rdzv-backend c10d --rdzv-endpoint {ADDRESSES[0]}:29500".split()
    training = ["pretrain_hmoe.py", *FLAGS, "--train-iters", STEPS]
    runs = []
    for node, host in enumerate(hosts):
        own = ["--rdzv-conf", f"is_host={int(node == 0)}", "--local-addr", ADDRESSES[node]]
        runs.append(start(*host, *TORCHRUN, *words, *own, *training, GLOO_SOCKET_IFNAME="wire"))
    return steps("".join(finish(run) for run in runs))


def test_torchrun_with_c10d(by_c10d):
    assert [int(step) for step, _, _ in by_c10d] == list(range(1, STEPS + 1))


def test_a_rank_killed_on_the_second_host_costs_nothing_but_time(hosts, by_c10d, tmp_path):
    """The same losses to the last printed digit; and no process is left."""
    flags = ["--train-iters", STEPS, "--save-interval", SAVE_EVERY, "--save", tmp_path, "--load", tmp_path]
    command = [sys.executable, "tools/launch.py", "--nproc-per-node", "1", "pretrain_hmoe.py", *FLAGS, *flags]
    first, second = (
        start(*host, *command, NNODES="2", NODE_RANK=str(node), MASTER_ADDR=ADDRESSES[0])
        for node, host in enumerate(hosts)
    )
    tracker, until = tmp_path / "latest_checkpointed_iteration.txt", time.monotonic() + WAIT_S
    while not tracker.exists():
        assert time.monotonic() < until and first.poll() is None, output(first)[-3000:]
        time.sleep(0.02)
    (rank,) = psutil.Process(second.pid).children()
    rank.kill()
    log, log_of_last_rank = finish(first), finish(second)
    lines = [line for line in log.splitlines() if line.startswith("launch: rank")]
    assert len(lines) == 1, lines
    found = re.search(r"rank 1 on \S+ was killed by SIGKILL: restart 1 of 10 from step (\d+) in 1 s", lines[0])
    assert found, lines
    saved, done = int(found[1]), steps(log_of_last_rank)
    again = max(i for i, (step, _, _) in enumerate(done) if int(step) == saved + 1)  # done once, or twice
    assert [int(step) for step, _, _ in done[again:]] == list(range(saved + 1, STEPS + 1))
    # A start prints in its second step the mean loss of the first two.
    same = [step for number, step in enumerate(done) if number not in (1, again + 1)]
    assert len(same) >= STEPS - 2 and set(same) <= set(by_c10d)
    for host in hosts:
        assert_empty(host)


def test_the_examples_start_with_what_their_readme_says(hosts, by_c10d, tmp_path):
    (tmp_path / "tiny.args").write_text("\n".join(re.split(r" (?=--)", shlex.join(FLAGS))) + "\n")
    command = [sys.executable, "examples/run.py", tmp_path / "tiny.args", "--train-iters", "2"]
    nodes = {"NNODES": "2", "MASTER_ADDR": ADDRESSES[0], "NPROC_PER_NODE": "1"}
    runs = [start(*host, *command, **nodes, NODE_RANK=str(node)) for node, host in enumerate(hosts)]
    assert steps("".join(finish(run) for run in runs)) == by_c10d[:2]
