"""Bit flips, zeroed pages and truncations in every file of a checkpoint and in the tracker."""

import random
import shutil

import pytest

from hmoe_megatron.checkpoint import directory
from hmoe_megatron.checkpoint.loading import check_files
from hmoe_megatron.checkpoint.manifest import MANIFEST_FILE, load_manifest
from hmoe_megatron.checkpoint.reader import read_metadata
from hmoe_megatron.exits import CheckpointRefused
from tests.faults.harness import run

PAGE_BYTES = 4096
DAMAGES, SEEDED_DAMAGES = 1000, 100  # of each kind
LOADED, SEEDED_LOADED = 20, 2  # by a whole run


def flip(data, draw):
    at = draw.randrange(len(data) * 8)
    return data[: at // 8] + bytes([data[at // 8] ^ 1 << at % 8]) + data[at // 8 + 1 :]


def zero_page(data, draw):
    start = draw.randrange(0, len(data), PAGE_BYTES)
    return data[:start] + bytes(len(data[start : start + PAGE_BYTES])) + data[start + PAGE_BYTES :]


def truncate(data, draw):
    return data[: draw.randrange(len(data))]


KINDS = {"single-bit flips": flip, "zeroed pages": zero_page, "truncations": truncate}


def damaged(path, kind, draw):
    """(file of the checkpoint or the tracker beside it, its bytes, other bytes), each file as likely as another."""
    files = [*sorted(path.iterdir()), path.parent / directory.TRACKER_FILE]
    while True:
        file = draw.choice(files)
        data = file.read_bytes()
        if (other := KINDS[kind](data, draw)) != data:
            return file, data, other


def refusal(root, path):
    """What loading says of damage; None if it finds none. Anything but CheckpointRefused is an error."""
    try:
        found = directory.find(root)
        load_manifest(found[1])
        check_files(found[1], skip_integrity=False)
    except CheckpointRefused as error:
        return str(error)
    return None


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("count", [SEEDED_DAMAGES, pytest.param(DAMAGES, marks=pytest.mark.campaign)])
def test_every_damage_is_found(kind, count, two, tmp_path, told):
    draw = random.Random(count)
    path = two.copy_to(tmp_path, 8)
    whole = load_manifest(path)
    assert refusal(tmp_path, path) is None
    for _ in range(count):
        file, data, other = damaged(path, kind, draw)
        file.write_bytes(other)
        said = refusal(tmp_path, path)
        if file.name == MANIFEST_FILE and said is None:  # 1e-05 or 1E-05, a line's end or none: it says the same
            assert load_manifest(path) == whole
        else:
            named = file.name if file.name != directory.TRACKER_FILE or "missing" not in said else "iter_"
            assert said and named in said, f"{file.name}: {said}"
        if file.name == ".metadata":
            refused_or_read(path)
        file.write_bytes(data)
    assert refusal(tmp_path, path) is None
    told(kind, count, "all found before anything was unpickled; the file is named")


def refused_or_read(path):
    """With --hmoe-skip-integrity damaged metadata may be read, but fails in no other way than by being refused."""
    try:
        read_metadata(path)
    except CheckpointRefused as error:
        assert ".metadata" in str(error)


@pytest.mark.parametrize("count", [SEEDED_LOADED, pytest.param(LOADED, marks=pytest.mark.campaign)])
def test_a_run_refuses_damage(count, two, tmp_path, told):
    draw = random.Random(count)
    for number in range(count):
        root = tmp_path / f"run{number}"
        path = two.copy_to(root, 8)
        kind = draw.choice(sorted(KINDS))
        while (drawn := damaged(path, kind, draw))[0].name in (MANIFEST_FILE, directory.TRACKER_FILE):
            pass
        file, _, other = drawn
        file.write_bytes(other)
        ended = run(2, root, tmp_path / f"scratch{number}")
        assert ended.codes == [3, 3], ended.tail
        assert file.name in ended.error and "--ckpt-step" in ended.error
        assert ended.losses == {} and directory.read_tracker(root) == 8
        shutil.rmtree(root)
    told("damage of these kinds, loaded by a run", count, "exit code 3; file and remedy are named")
