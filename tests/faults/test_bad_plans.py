"""Placement plans that can't serve the run, given to a run that would resume."""

import json

import pytest

from hmoe_megatron.placement.plan import PlacementPlan
from hmoe_megatron.placement.planner import contiguous_plan
from hmoe_megatron.untrusted import canonical, checksum
from tests.distributed.plans import WIDTHS
from tests.distributed.training_run import LAYERS
from tests.faults.harness import run

OTHER_WIDTHS = (32, 32, 48, 48)


def plan(widths=WIDTHS, ranks=2, change=lambda body: None):
    body = json.loads(contiguous_plan((widths,) * LAYERS, ranks).to_json())
    del body["sha256"]
    change(body)
    return canonical(body | {"sha256": checksum(body)})


def drop_a_range(body):
    body["layers"][1]["pieces"][0][1][2] -= 8


def double_a_range(body):
    body["layers"][1]["pieces"][0].append(list(body["layers"][1]["pieces"][1][0]))


def cap_memory(body):
    body["ranks"][1][2] = 1000


PLANS = {
    "for another EP size": (plan(ranks=1), "made for 1 ranks, but --expert-model-parallel-size 2"),
    "for other widths": (plan(OTHER_WIDTHS), "made for other widths (--hmoe-widths) in layers 0-1"),
    "with a missing range": (plan(change=drop_a_range), "layer 1: expert 1"),
    "with a doubled range": (plan(change=double_a_range), "layer 1: expert 2"),
    "over the memory cap": (plan(change=cap_memory), "rank 1 lacks"),
    "nested a million deep": ("[" * 1_000_000, "nested too deeply"),
    "that is a pickle": ("\x80\x04\x95cposix\nsystem\n", "not UTF-8 text"),
}


def test_the_plan_without_the_mistake_is_read():
    assert PlacementPlan.from_json(plan(), (WIDTHS,) * LAYERS, 2).ranks == 2


@pytest.mark.parametrize("which", PLANS)
def test_a_bad_plan(which, two, tmp_path, told):
    text, message = PLANS[which]
    file, root = tmp_path / "plan.json", tmp_path / "run"
    file.write_bytes(text.encode("latin-1"))
    two.copy_to(root, 4)
    ended = run(2, root, tmp_path / "scratch", flags=f"--hmoe-placement {file}")
    assert ended.codes == [2, 2] and ended.losses == {}, ended.tail
    assert str(file) in ended.error and message in ended.error
    told(f"a plan {which}", 1, "exit code 2; file, place and remedy are named")
