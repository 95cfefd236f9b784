"""SIGKILL of a rank at random moments, and before every file operation of a save."""

import os
import random
import shutil
from collections import Counter
from functools import partial

import pytest

from hmoe_megatron.checkpoint import directory
from tests.faults.harness import check_finished, check_lasting, check_little_lost, reference, run
from tests.faults.inside import kill_after, kill_at_operation, kill_in_a_change
from tests.rows import rarely

KILLS, SEEDED_KILLS = int(os.environ.get("FAULTS_KILLS", "100")), 2  # on two ranks, and as many on four
OPERATIONS_OF_A_SAVE = 30  # on files of --save, by rank 0
MOVING = (
    "--hmoe-replan-interval 1 --hmoe-replan-max-loss 1 --hmoe-max-cuts 0 --hmoe-placement contiguous "
    "--deterministic-mode --moe-token-dispatcher-type alltoall"
)
FLAVOURS = {
    "asynchronous saves": "--async-save --use-persistent-ckpt-worker",
    "data loader's workers": "--num-workers 2",
}


def kill_often(expected, kills, tmp_path, seed, flags=""):
    """Kill a random rank at random moments until it was done `kills` times, each run going on where the last was
    killed; a run that comes to its end is compared, and the next starts anew.

    Returns killed ranks by phase, and in how many runs a rank ended only when it was told to.
    """
    draw, phases, told = random.Random(seed), Counter(), 0
    root, scratch = tmp_path / "run", tmp_path / "scratch"
    while phases.total() < kills:
        victim = draw.randrange(expected.ranks)
        kill = partial(kill_after, victim=victim, cpu_s=draw.uniform(0, 0.95 * expected.cpu_s))
        ended = run(expected.ranks, root, scratch, kill, flags=flags)
        if ended.killed:
            assert ended.codes[victim] == -9, ended.tail
            check_little_lost(
                ended,
                check_lasting(root, expected) if root.exists() else None,
                intervals=2 if "--async-save" in flags else 1,
            )
            phases[ended.killed.split(":")[0]] += 1
            told += any(rank.told for rank in ended.ranks)
        else:
            check_finished(ended, root, expected)
            shutil.rmtree(root)
            shutil.rmtree(scratch)
    check_finished(run(expected.ranks, root, scratch, flags=flags), root, expected)
    return phases, told


def tell(told, what, phases, told_to_end):
    where = ", ".join(f"{count} in {phase}" for phase, count in sorted(phases.items()))
    told(
        f"SIGKILL of a random rank, {what}",
        phases.total(),
        f"{where}; every run went on bitwise; in {told_to_end} a survivor ended only by SIGTERM",
    )


@pytest.mark.parametrize("ranks", ["two", *rarely("four")])
def test_seeded_kills(ranks, request, tmp_path, told):
    tell(told, f"{ranks} ranks, the suite's", *kill_often(request.getfixturevalue(ranks), SEEDED_KILLS, tmp_path, 1))


@pytest.mark.campaign
@pytest.mark.parametrize("ranks", ["two", "four"])
def test_random_kills(ranks, request, tmp_path, told):
    tell(told, f"{ranks} ranks", *kill_often(request.getfixturevalue(ranks), KILLS, tmp_path, 2))


@pytest.mark.campaign
@pytest.mark.parametrize("flavour", FLAVOURS)
def test_random_kills_of_other_runs(flavour, two, tmp_path, told):
    tell(told, f"two ranks, {flavour}", *kill_often(two, max(1, KILLS // 5), tmp_path, 3, FLAVOURS[flavour]))


def kill_at(expected, folder, **operation):
    """Rank 0 killed before an operation of its first save, then the run ends well. Returns where it was."""
    root, scratch = folder / "run", folder / "scratch"
    ended = run(expected.ranks, root, scratch, partial(kill_at_operation, root=root, **operation))
    assert ended.killed and ended.codes[0] == -9, ended.tail
    check_little_lost(ended, check_lasting(root, expected))
    check_finished(run(expected.ranks, root, scratch), root, expected)
    shutil.rmtree(root)
    return ended.killed


@pytest.mark.parametrize("name", [r"\.iter_0000002.saving", r"\.latest.*", *rarely(r"\.iter_0000002.saving/\.hmoe.*")])
def test_a_kill_before_a_file_gets_its_name(name, two, tmp_path):
    kill_at(two, tmp_path, what=f"os.rename of {name}")


@pytest.mark.campaign
def test_kills_before_every_file_operation_of_a_save(two, tmp_path, told):
    where = set()
    for number in range(1, OPERATIONS_OF_A_SAVE + 1):
        (tmp_path / str(number)).mkdir()
        where.add(kill_at(two, tmp_path / str(number), number=number))
    for name in (".latest_checkpointed", ".iter_0000002.saving", ".iter_0000002.saving/.metadata"):
        assert any(f"os.rename of {name}" in at for at in where)
    told("SIGKILL before every file operation of a save", OPERATIONS_OF_A_SAVE, "every run went on bitwise")


@pytest.fixture(scope="module")
def moving(tmp_path_factory):
    return reference(2, tmp_path_factory.mktemp("moving"), MOVING)


@pytest.mark.parametrize("kills", rarely(30))
def test_kills_while_experts_move(kills, moving, tmp_path, told):
    """Each run goes on from the last checkpoint, under its plan or another; the bits are those of the run whose changes
    came to their end."""
    draw, root, scratch, where = random.Random(kills), tmp_path / "run", tmp_path / "scratch", Counter()
    while where.total() < kills:
        victim, flags = draw.randrange(2), f"{MOVING} {draw.choice(('', '--hmoe-placement checkpoint'))}"
        flags = flags if directory.complete_iterations(root) else MOVING
        ended = run(2, root, scratch, partial(kill_in_a_change, victim=victim, number=draw.randint(1, 17)), flags=flags)
        if ended.killed:
            assert ended.codes[victim] == -9, ended.tail
            check_little_lost(ended, check_lasting(root, moving) if root.exists() else None)
            where[ended.killed.partition(": ")[2]] += 1
        else:  # the plan was even, or had come far
            check_finished(ended, root, moving)
            shutil.rmtree(root)
            shutil.rmtree(scratch)
    check_finished(run(2, root, scratch, flags=MOVING), root, moving)
    told("SIGKILL of a rank while experts move", where.total(), f"{dict(where)}; every run went on bitwise")


def test_a_kill_while_a_checkpoint_is_replaced(two, tmp_path, told):
    """Steps are done again from an older checkpoint; the one that is in the way stays until the new one is there. The
    next run takes its plan from it too."""
    root = tmp_path / "run"
    two.copy_to(root, 2)
    two.copy_to(root, 4)
    kill = partial(kill_at_operation, root=root, what=r"os.rename of \.iter_0000004.saving")
    ended = run(2, root, tmp_path / "scratch", kill, flags="--ckpt-step 2")
    assert ended.codes[0] == -9, ended.tail
    assert sorted(path.name for path in root.glob(".iter*")) == [".iter_0000004.replaced", ".iter_0000004.saving"]
    check_finished(run(2, root, tmp_path / "scratch", flags="--hmoe-placement checkpoint"), root, two)
    told("SIGKILL while a checkpoint is replaced", 1, "the replaced one was put back; the run went on bitwise")
