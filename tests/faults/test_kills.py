"""SIGKILL of a rank at random moments, and before every file operation of a save."""

import random
import shutil
import time
from collections import Counter
from functools import partial

import pytest

from tests.faults.harness import check_finished, check_lasting, check_little_lost, run
from tests.faults.inside import kill_after, kill_at_operation

KILLS, SEEDED_KILLS = 100, 4  # on two ranks, and as many on four
RUN_CPU_S = 2.5  # of a whole run's rank, start and end included, a little less than what it takes
FLAVOURS = {"": "", "asynchronous saves": "--async-save", "data loader's workers": "--num-workers 2"}


def kill_often(expected, kills, tmp_path, seed, flags=""):
    """Kill a random rank at random moments until it was done `kills` times, each run going on where the last was
    killed; a run that comes to its end is compared, and the next starts anew. Returns killed ranks by phase."""
    draw, phases, slowest_s = random.Random(seed), Counter(), 0.0
    root, scratch = tmp_path / "run", tmp_path / "scratch"
    while phases.total() < kills:
        victim = draw.randrange(expected.ranks)
        started_s = time.monotonic()
        ended = run(expected.ranks, root, scratch, partial(kill_after, victim=victim, cpu_s=draw.uniform(0, RUN_CPU_S)),
                    flags=flags)  # fmt: skip
        slowest_s = max(slowest_s, time.monotonic() - started_s)
        if ended.killed:
            assert ended.codes[victim] == -9, ended.tail
            check_little_lost(ended, check_lasting(root, expected) if root.exists() else None)
            phases[ended.killed.split(":")[0]] += 1
            phases["told to end"] -= 0
        else:
            check_finished(ended, root, expected)
            shutil.rmtree(root)
            shutil.rmtree(scratch)
    check_finished(run(expected.ranks, root, scratch, flags=flags), root, expected)
    return phases, slowest_s


def tell(told, what, phases, slowest_s):
    where = ", ".join(f"{count} in {phase}" for phase, count in sorted(phases.items()) if count)
    told(f"SIGKILL of a random rank, {what}", phases.total(),
         f"{where}; every run went on bitwise; slowest end {slowest_s:.0f} s after the start")  # fmt: skip


@pytest.mark.parametrize("ranks", ["two", "four"])
def test_seeded_kills(ranks, request, tmp_path):
    kill_often(request.getfixturevalue(ranks), SEEDED_KILLS, tmp_path, seed=1)


@pytest.mark.campaign
@pytest.mark.parametrize("ranks", ["two", "four"])
def test_random_kills(ranks, request, tmp_path, told):
    tell(told, f"{ranks} ranks", *kill_often(request.getfixturevalue(ranks), KILLS, tmp_path, seed=2))
