"""The measured profile on two ranks: their links, and the tool under torchrun."""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from hmoe_megatron.placement.profiles import profile_named
from hmoe_megatron.tools.calibration.layers import layers_kept_apart, layers_to_fit
from tests.distributed.ranks import run_ranks

ROOT = Path(__file__).parents[2]
GRID = ((64,), (8, 64), (16, 64))
INSIDE, ACROSS = "intra_node_bytes_per_s", "inter_node_bytes_per_s"


def measured(ranks_per_node):
    from hmoe_megatron.tools.calibration.machine import measure

    os.environ["LOCAL_WORLD_SIZE"] = str(ranks_per_node)  # nodes exist by torchrun's word only
    found = measure(layers_to_fit(*GRID), layers_kept_apart(*GRID), 0.2)
    return found.profile, found.times_s, {name: len(errors) for name, errors in found.errors.items()}


@pytest.mark.parametrize("ranks_per_node, linked, other", [(2, INSIDE, ACROSS), (1, ACROSS, INSIDE)])
def test_the_link_that_two_ranks_have_is_measured(ranks_per_node, linked, other):
    (profile, times_s, cases), (profile_1, times_1_s, _) = run_ranks(2, measured, ranks_per_node)
    assert profile == profile_1 and times_s.tolist() == times_1_s.tolist(), "both ranks know the same"
    assert getattr(profile, other) is None and other not in profile.sources
    # From a slow socket to the memory of the machine; that time rises with bytes is why there is a rate at all.
    assert 1e6 < getattr(profile, linked) < 1e12 and "8 all-to-alls" in profile.sources[linked]
    assert list(cases.values()) == [4, 1, 8, 3] and all(times_s > 0)
    assert math.isfinite(profile.flops_per_s) and "2 rank(s)" in profile.sources["flops_per_s"]


def test_nodes_of_unequal_size_are_refused():
    with pytest.raises(ValueError, match="2 ranks on nodes of 3.*--nproc-per-node"):
        run_ranks(2, measured, 3)


@pytest.mark.campaign
def test_the_tool_under_torchrun(tmp_path):
    flags = "--hidden-size 64 --rows 8 64 --widths 16 64 --seconds 0.5".split()
    run = subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node",
            "2",
            "tools/profile_hardware.py",
            "--output",
            tmp_path / "profile.json",
            *flags,
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
    )
    assert run.returncode == 0, run.stderr[-3000:]
    assert os.listdir(tmp_path) == ["profile.json"]
    profile = profile_named(tmp_path / "profile.json")
    assert profile.intra_node_bytes_per_s > 0 and profile.inter_node_bytes_per_s is None and profile.element_bytes == 4
    for part in (
        "4 layers to fit, 1 kept apart, 2 rank(s)",
        "received inside a node",
        "link inside a node, kept apart",
        "profile.json: written",
    ):
        assert run.stdout.count(part) == 1, f"once, by rank 0: {part}\n{run.stdout}"
