"""Saves that fail: absorbed, reported, counted; the last good checkpoint stays; a run that goes on is bitwise equal."""

import errno
import functools
import json

import pytest

from hmoe_megatron.checkpoint import directory, manifest
from tests.distributed.pretrain_run import pretrain
from tests.distributed.ranks import run_ranks
from tests.rows import rarely

STEPS = "--train-iters 8 --save-interval 2 --expert-model-parallel-size 2 --use-distributed-optimizer"
ASYNC = "--async-save --use-persistent-ckpt-worker"
KINDS = {"sync": "", "async": ASYNC}


def run(root, *args, flags=""):
    return run_ranks(2, pretrain, f"{STEPS} --save {root} --load {root} {flags}", *args, timeout_s=240)


def losses(root):
    records = [json.loads(line) for line in (root / "telemetry.jsonl").read_text().splitlines()]
    return [(record["iteration"], record["active_width"]) for record in records]


def assert_sound(root, last):
    """The tracker names `last`, which is complete and undamaged; nothing half written is left."""
    iteration, path = directory.find(root)
    assert iteration == last
    assert manifest.damaged_files(path, manifest.load_manifest(path).files) == []
    assert [entry.name for entry in root.iterdir() if entry.name.startswith(".") and entry.name != ".hmoe_lock"] == []


def fail(where, times, rank):
    """Let the disk be full `times` times where a save writes its shard, its metadata, its manifest, its tracker."""
    import torch
    from megatron.core.dist_checkpointing import core
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    from hmoe_megatron.patches.registry import replace

    if torch.distributed.get_rank() != rank:
        return
    owner, name = {
        "shard": (filesystem_async, "_write_item"),
        "metadata": (filesystem_async.FileSystemWriterAsync, "finish"),
        "config": (core, "save_config"),
        "directory": (directory, "begin"),
        "manifest": (manifest.Manifest, "save"),
        "rename": (directory, "publish"),
        "tracker": (directory, "write_tracker"),
    }[where]
    stock, left = getattr(owner, name), [times]

    @functools.wraps(stock)  # Megatron looks at the signature
    def full(*args, **named):
        if left[0]:
            left[0] -= 1
            raise OSError(errno.ENOSPC, "No space left on device")
        return stock(*args, **named)

    replace(owner, name, full)  # also where Megatron has it by name


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    root = tmp_path_factory.mktemp("whole")
    ended = run(root)
    assert [rank.code for rank in ended] == [0, 0]
    return root


def test_a_checkpoint_says_what_it_is_of(whole):
    assert_sound(whole, 8)
    path = directory.checkpoint_path(whole, 8)
    found = manifest.load_manifest(path)
    assert set(found.files) == {entry.name for entry in path.iterdir()} - {directory.MANIFEST_FILE}
    assert found.settings["expert_widths"] == {"0": [16, 32, 48, 64], "1": [16, 32, 48, 64]}
    assert found.settings["vocab_size"] == 128 and found.settings["hmoe_p_penalty_coeff"] == 0.1
    assert found.settings["moe_router_topk"] == 2 and found.layout["expert_model_parallel_size"] == 2
    assert (path / "placement_plan.json").read_bytes() == (whole / "placement_plan.json").read_bytes()


OFTEN = ("shard",)
RARELY = ("tracker", "metadata", "config", "directory", "manifest", "rename")


@pytest.mark.parametrize("where", [*OFTEN, *rarely(*RARELY)])
def test_a_save_that_fails_once_is_tried_again(whole, tmp_path, where):
    ended = run(tmp_path, fail, where, 1, 1 if where == "shard" else 0)
    assert [rank.code for rank in ended] == [0, 0]
    assert ended[0].output.count("try 1 of 2 to save iteration 2 failed") == 1
    assert "No space left" in ended[0].output and "MB free there" in ended[0].output
    assert_sound(tmp_path, 8)
    assert losses(tmp_path) == losses(whole)


@pytest.mark.parametrize("kind", ["sync", *rarely("async")])
def test_training_goes_on_after_a_failed_save_and_the_next_one_works(whole, tmp_path, kind):
    # An asynchronous save is not tried again at once; its writer is a process of its own, where nothing fails here.
    where, times, rank = {"sync": ("shard", 2, 1), "async": ("manifest", 1, 0)}[kind]
    ended = run(tmp_path, fail, where, times, rank, flags=KINDS[kind])
    assert [rank.code for rank in ended] == [0, 0]
    assert "training goes on (1 of --hmoe-max-failed-saves 3 in a row)" in ended[0].output
    assert_sound(tmp_path, 8)
    assert directory.complete_iterations(tmp_path) == [4, 6, 8]
    assert losses(tmp_path) == losses(whole)


@pytest.mark.parametrize("kind", ["sync", *rarely("async")])
def test_the_run_ends_after_a_set_number(tmp_path, kind):
    ended = run(tmp_path, fail, "manifest", 1000, 0, flags=f"{KINDS[kind]} --hmoe-max-failed-saves 2")
    assert [rank.code for rank in ended] == [4, 4]
    (error,) = ended[0].errors()
    assert "2 saves in a row failed (--hmoe-max-failed-saves 2)" in error and "No space left" in error
    assert directory.complete_iterations(tmp_path) == [] and not (tmp_path / directory.TRACKER_FILE).exists()


@pytest.mark.campaign
def test_a_last_save_that_fails_is_no_success(tmp_path):
    assert [rank.code for rank in run(tmp_path, flags="--exit-interval 6")] == [0, 0]
    before = (tmp_path / "iter_0000006" / directory.MANIFEST_FILE).read_bytes()
    ended = run(tmp_path, fail, "rename", 1000, 0)
    assert [rank.code for rank in ended] == [4, 4] and "the last save of the run failed" in ended[0].errors()[0]
    assert_sound(tmp_path, 6)
    assert (tmp_path / "iter_0000006" / directory.MANIFEST_FILE).read_bytes() == before


def not_a_number():
    """From the third step on a weight of expert 3 is a NaN, on the rank that holds it, after the optimizer's step."""
    import torch
    from megatron.training import training

    stock = training.train_step

    def train_step(forward, data, model, *args, **named):
        result = stock(forward, data, model, *args, **named)
        if named["iteration"] == 2:
            for experts in (module for module in model[0].modules() if hasattr(module, "by_piece")):
                for piece, weight in experts.by_piece("linear_fc2_weight"):
                    if piece.expert == 3:
                        weight.data[0, 0] = torch.nan
        return result

    training.train_step = train_step


def test_weights_that_are_no_numbers_are_not_saved(tmp_path):
    ended = run(tmp_path, not_a_number, flags="--save-interval 3")
    assert [rank.code for rank in ended] == [4, 4]
    (error,) = ended[0].errors()
    assert "iteration 3 is not saved: not finite on rank" in error and "layer 0 expert 3" in error
    assert directory.complete_iterations(tmp_path) == []


def refuse_a_queue():
    stock = directory.begin

    def begin(path):
        assert list(path.parent.glob(".iter_*.saving")) == []
        return stock(path)

    directory.begin = begin


def test_async_saves_are_the_same_checkpoint_and_one_at_a_time(whole, tmp_path):
    ended = run(tmp_path, refuse_a_queue, flags=ASYNC)
    assert [rank.code for rank in ended] == [0, 0]
    assert_sound(tmp_path, 8)
    one, other = (manifest.load_manifest(directory.checkpoint_path(root, 8)).files for root in (whole, tmp_path))
    assert one["__1_0.distcp"] == other["__1_0.distcp"]  # rank 0's holds the arguments, --save among them
    assert losses(tmp_path) == losses(whole)
