"""Ranks that look for a checkpoint while rank 0 tidies what a killed run left."""

import argparse
import threading
import time

import pytest

from hmoe_megatron.checkpoint import directory
from hmoe_megatron.checkpoint.session import Checkpoints, starting_checkpoint
from hmoe_megatron.exits import CheckpointRefused
from hmoe_megatron.files import PLAN_FILE


def arguments(root):
    return argparse.Namespace(
        save=str(root), load=str(root), ckpt_step=None, pretrained_checkpoint=None, exit_on_missing_checkpoint=False
    )


@pytest.fixture
def second_rank(tmp_path, monkeypatch):
    """Finds and prepares the checkpoints of a run in tmp_path, as rank 1; of a checkpoint only its manifest is read."""
    monkeypatch.setenv("RANK", "1")

    def compare(self, path):
        if not (path / directory.MANIFEST_FILE).is_file():
            raise CheckpointRefused(f"{path}: no manifest")

    monkeypatch.setattr(Checkpoints, "compare", compare)
    monkeypatch.setattr("hmoe_megatron.checkpoint.settings.model_settings", lambda *_: {})
    args = arguments(tmp_path)

    def prepare():
        start = starting_checkpoint(args)
        Checkpoints(args, argparse.Namespace(plan=None, settings=None, widths=()), start).prepare()
        return start

    return prepare


def cut_off(root, in_the_way: bool):
    """What a run leaves that is killed between the two renames by which iteration 4 is replaced."""
    replaced = root / ".iter_0000004.replaced"
    replaced.mkdir()
    (replaced / directory.MANIFEST_FILE).write_text("old")
    if in_the_way:
        directory.checkpoint_path(root, 4).mkdir()
    directory.write_tracker(root, 4)


@pytest.mark.parametrize("in_the_way", [False, True])
def test_a_rank_waits_until_the_first_has_put_a_checkpoint_back(in_the_way, second_rank, tmp_path):
    cut_off(tmp_path, in_the_way)
    first = threading.Timer(0.3, directory.tidy, [tmp_path])
    first.start()
    start = second_rank()
    first.join()
    assert (start.iteration, start.path) == (4, directory.checkpoint_path(tmp_path, 4))
    assert start.plan_file().parent == start.path != start.lies, "the plan is read where it is now"
    assert directory.complete_iterations(tmp_path) == [4]


def test_the_plan_is_read_where_the_checkpoint_is(tmp_path):
    cut_off(tmp_path, in_the_way=False)
    (tmp_path / ".iter_0000004.replaced" / PLAN_FILE).write_text("{}")
    start = starting_checkpoint(arguments(tmp_path))
    assert start.plan_file() == tmp_path / ".iter_0000004.replaced" / PLAN_FILE
    directory.tidy(tmp_path)
    assert start.plan_file() == directory.checkpoint_path(tmp_path, 4) / PLAN_FILE and start.plan_file().exists()


def test_a_rank_does_not_wait_where_nothing_is_to_be_put_back(second_rank, tmp_path):
    directory.write_tracker(tmp_path, 4)
    started_s = time.monotonic()
    with pytest.raises(CheckpointRefused, match="iter_0000004: missing"):
        second_rank()
    assert time.monotonic() - started_s < 5
