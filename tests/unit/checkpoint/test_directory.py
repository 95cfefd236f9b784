"""A run's directory: which checkpoint is the last good one, and what a save that is cut off anywhere leaves."""

import os
import shutil

import pytest

from hmoe_megatron.checkpoint import directory
from hmoe_megatron.checkpoint.directory import MANIFEST_FILE, TRACKER_FILE, checkpoint_path
from hmoe_megatron.exits import CheckpointRefused


def add(root, iteration, content="old"):
    """A complete checkpoint."""
    path = checkpoint_path(root, iteration)
    path.mkdir(parents=True)
    (path / MANIFEST_FILE).write_text(content)
    return path


def save(root, iteration, content):
    """What `saving` does with a directory, in its order."""
    path = checkpoint_path(root, iteration)
    path.mkdir(exist_ok=True)  # Megatron's
    saving = directory.begin(path)
    (saving / MANIFEST_FILE).write_text(content)
    directory.publish(path)
    directory.write_tracker(root, iteration)


def contents(root):
    return {path.name: (path / MANIFEST_FILE).read_text() for path in root.glob("iter_*") if path.is_dir()}


def test_the_tracker_names_the_last_good_checkpoint(tmp_path):
    add(tmp_path, 4)
    add(tmp_path, 8)
    directory.write_tracker(tmp_path, 4)
    assert directory.find(tmp_path) == (4, checkpoint_path(tmp_path, 4))
    assert directory.find(tmp_path, step=8) == (8, checkpoint_path(tmp_path, 8))


def test_without_a_tracker_the_newest_complete_one_counts(tmp_path):
    add(tmp_path, 4)
    checkpoint_path(tmp_path, 8).mkdir()
    assert directory.find(tmp_path) == (4, checkpoint_path(tmp_path, 4))


def test_nothing_there_is_a_start_only_where_the_run_saves_itself(tmp_path):
    for root in (tmp_path, tmp_path / "missing"):
        assert directory.find(root, may_be_new=True) is None
        with pytest.raises(CheckpointRefused, match=f"--load {root}.*give"):
            directory.find(root)


@pytest.mark.parametrize("text", ["", " \n", "release", "-3", "0", "1e9", "../../etc", "9" * 13, "12\x00", "\ufffd"])
def test_a_damaged_tracker_is_refused_and_the_complete_checkpoints_are_named(tmp_path, text):
    add(tmp_path, 4)
    (tmp_path / TRACKER_FILE).write_text(text)
    with pytest.raises(CheckpointRefused, match=f"{TRACKER_FILE}.*complete checkpoints there: 4"):
        directory.find(tmp_path, may_be_new=True)


def test_a_tracker_that_is_no_text_is_refused(tmp_path):
    (tmp_path / TRACKER_FILE).write_bytes(b"\xff\xfe\x00")
    with pytest.raises(CheckpointRefused, match="no complete checkpoint is there"):
        directory.find(tmp_path)
    (tmp_path / TRACKER_FILE).unlink()
    (tmp_path / TRACKER_FILE).mkdir()
    with pytest.raises(CheckpointRefused, match="Is a directory"):
        directory.find(tmp_path)


def test_a_checkpoint_that_is_named_and_missing_is_refused(tmp_path):
    add(tmp_path, 4)
    directory.write_tracker(tmp_path, 8)
    with pytest.raises(CheckpointRefused, match="iter_0000008: missing, and latest.*there: 4: give one of them"):
        directory.find(tmp_path, may_be_new=True)
    with pytest.raises(CheckpointRefused, match="iter_0000009: missing, and --ckpt-step"):
        directory.find(tmp_path, step=9)


def test_one_that_is_to_be_put_back_is_found_where_it_lies(tmp_path):
    add(tmp_path, 4)
    directory.write_tracker(tmp_path, 4)
    assert directory.find(tmp_path, put_back=True) == (4, checkpoint_path(tmp_path, 4))
    lies = tmp_path / ".iter_0000004.replaced"
    checkpoint_path(tmp_path, 4).rename(lies)
    assert directory.find(tmp_path, put_back=True) == (4, lies)
    with pytest.raises(CheckpointRefused, match="missing"):
        directory.find(tmp_path)
    directory.tidy(tmp_path)
    assert directory.find(tmp_path, put_back=True) == (4, checkpoint_path(tmp_path, 4))


def test_a_file_in_place_of_the_directory(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointRefused, match="is no directory"):
        directory.find(tmp_path / "file", may_be_new=True)


@pytest.mark.parametrize("iteration", [4, 8], ids=["over the last good one", "a new one"])
def test_a_save_cut_off_at_any_step_harms_nothing(tmp_path, monkeypatch, iteration):
    """Cut before each call in turn that changes the disk; after `tidy` the checkpoint that is named is whole."""
    changes = [(os, "rename"), (os, "replace"), (shutil, "rmtree"), (os, "fsync"), (os, "mkdir")]
    outcomes, cut_at, finished = set(), 0, False
    while not finished:
        root = tmp_path / str(cut_at)
        add(root, 4)
        directory.write_tracker(root, 4)
        left = [cut_at]

        def cutting(stock, left=left):
            def change(*args, **named):
                if left[0] == 0:
                    raise KeyboardInterrupt
                left[0] -= 1
                return stock(*args, **named)

            return change

        with monkeypatch.context() as patched:
            for owner, name in changes:
                patched.setattr(owner, name, cutting(getattr(owner, name)))
            try:
                save(root, iteration, "new")
                finished = True
            except KeyboardInterrupt:
                pass
        directory.tidy(root)
        found, path = directory.find(root)
        content = (path / MANIFEST_FILE).read_text()
        assert found in (4, iteration) and content in ("old", "new")
        if iteration == 8:
            assert contents(root)["iter_0000004"] == "old"
            assert content == ("new" if found == 8 else "old")
        assert sorted(p.name for p in root.iterdir()) == sorted([TRACKER_FILE, *contents(root)])
        outcomes.add(content)
        cut_at += 1
    assert cut_at > 6 and outcomes == {"old", "new"}
    assert content == "new" and found == iteration


def test_tidy_says_what_it_did_and_leaves_what_it_does_not_know(tmp_path):
    add(tmp_path, 4)
    for name in (".iter_0000008.saving", "iter_0000002", "iter_0000003", "mine", ".iter_0000004.replaced"):
        (tmp_path / name).mkdir()
    (tmp_path / "iter_0000003" / "of another program").write_text("")
    (tmp_path / "iter_0000009").symlink_to(tmp_path / "mine")
    (tmp_path / f".{TRACKER_FILE}.123.tmp").write_text("")
    (tmp_path / ".x.123.tmp").write_text("")
    done = directory.tidy(tmp_path)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == [
        ".x.123.tmp",
        "iter_0000003",
        "iter_0000004",
        "iter_0000009",
        "mine",
    ]
    assert len(done) == 4 and any("iter_0000002: removed, it was empty" in line for line in done)


def test_a_tidy_directory_stays_as_it_is(tmp_path):
    add(tmp_path, 4)
    directory.write_tracker(tmp_path, 4)
    assert directory.tidy(tmp_path) == [] and directory.tidy(tmp_path / "missing") == []
