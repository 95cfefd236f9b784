"""A full disk and read-only storage, by real file systems: both take root."""

import json
import subprocess
from functools import partial

import pytest

from hmoe_megatron.files import TELEMETRY_FILE
from tests.faults.harness import STEPS, check_finished, check_lasting, run
from tests.faults.inside import at_step, before, bind_read_only, do, empty, fill
from tests.rows import mostly_rarely

CHECKPOINT = "hmoe_megatron.checkpoint"
WRITER = "megatron.core.dist_checkpointing.strategies.filesystem_async:FileSystemWriterAsync"
DISK = "16m"
# Before what the disk is full: (function, bytes that are left); it is called once for each try to save.
FULL_AT = {
    "the middle of a shard": ((f"{CHECKPOINT}.saving", "write_then_hash"), 1 << 17),
    "`.metadata`": ((WRITER, "finish"), 0),
    "the manifest": ((f"{CHECKPOINT}.manifest:Manifest", "save"), 0),
    "the tracker": ((f"{CHECKPOINT}.directory", "write_tracker"), 0),
}


def mount(*words):
    done = subprocess.run(["mount", *map(str, words)], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"mount is not allowed here: {done.stderr.strip()}")


@pytest.fixture
def disk(tmp_path):
    """A directory on a small disk of its own."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount("-t", "tmpfs", "-o", f"size={DISK}", "tmpfs", folder)
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


@pytest.mark.parametrize("where", mostly_rarely(FULL_AT, ("the middle of a shard",)))
def test_a_full_disk_ends_the_run_after_three_saves(where, two, disk, tmp_path, told):
    root, scratch = disk / "run", tmp_path / "scratch"
    function, left = FULL_AT[where]
    ended = run(2, root, scratch, partial(before, function, (2, 99), 0, fill, disk, left))
    assert ended.codes == [4, 4], ended.tail
    assert "3 saves in a row failed" in ended.error and "No space left on device" in ended.error
    assert "rank " in ended.error or ".metadata" in ended.error
    assert check_lasting(root, two) == 2
    empty(disk)
    check_finished(run(2, root, scratch), root, two)
    told(
        f"disk full at {where}",
        1,
        "three saves were tried twice and reported; exit code 4; the last good one as it was; "
        "with space again the run went on bitwise",
    )


@pytest.mark.parametrize("where", mostly_rarely(FULL_AT, ("`.metadata`",)))
def test_a_disk_that_is_full_for_one_save_is_absorbed(where, two, disk, tmp_path, told):
    root, scratch = disk / "run", tmp_path / "scratch"
    function, left = FULL_AT[where]
    fault, mend = partial(before, function, (2, 99), 0, fill, disk, left), partial(at_step, 5, 0, empty, disk)
    ended = run(2, root, scratch, fault, mend)
    assert "try 2 of 2 to save iteration 4 failed" in ended.output and "training goes on (1 of" in ended.output
    check_finished(ended, root, two)
    assert [json.loads(line)["iteration"] for line in (root / TELEMETRY_FILE).read_text().splitlines()][-1] == STEPS
    told(f"disk full at {where}, for one save", 1, "told, training went on, the next save was good; exit code 0")


def test_a_disk_that_is_full_from_the_start(disk, tmp_path, told):
    fault = partial(do, fill, disk)
    ended = run(2, disk / "run", tmp_path / "scratch", fault)
    assert ended.codes[0] == 4 and ended.codes[1] != 0, ended.tail
    assert "No space left on device" in ended.error and str(disk) in ended.error
    told("disk full from the start", 1, "exit code 4, the directory is named")


def test_storage_that_turns_read_only(two, tmp_path, told):
    root, scratch = tmp_path / "run", tmp_path / "scratch"
    root.mkdir()
    mount("--bind", root, root)  # whether it is allowed
    subprocess.run(["umount", root], check=True)
    try:
        ended = run(2, root, scratch, partial(at_step, 3, 0, bind_read_only, root))
    finally:
        subprocess.run(["umount", root])
    assert ended.codes == [4, 4], ended.tail
    assert "Read-only file system" in ended.error
    assert check_lasting(root, two) == 2
    check_finished(run(2, root, scratch), root, two)
    told(
        "storage turns read-only", 1, "exit code 4 after three failed saves; went on bitwise when it was writable again"
    )


def test_storage_that_is_read_only_from_the_start(disk, tmp_path, told):
    mount("-o", "remount,ro", disk)
    ended = run(2, disk / "run", tmp_path / "scratch")
    assert ended.codes[0] == 2 and ended.codes[1] != 0, ended.tail
    assert f"--save {disk}/run: Read-only file system" in ended.error
    told("storage is read-only from the start", 1, "exit code 2, --save is named")
