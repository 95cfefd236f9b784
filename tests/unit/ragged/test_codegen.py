"""Machine code of the kernels for GPUs that are not there: no spills, tensor cores, asynchronous copies, shared memory
within what the GPU has. What no interpreter shows: a lost divisibility hint costs all of it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
# Shared memory that a program may have, and the tensor cores' instruction.
GPUS = {80: (166_912, "mma"), 90: (232_448, "wgmma"), 100: (232_448, "tcgen05"), 120: (101_376, "mma")}
SPILLED_BYTES = {(100, "large, few rows"): 64}  # at most; none elsewhere
PRODUCTS = {"up", "from_hidden", "hidden_grad", "weight_grad"}
ODD = ("--widths", "864,1048,2208", "--hidden", "784")  # multiples of 8 and of 16, and of nothing more


@pytest.fixture
def compiled(pytestconfig):
    """(words of codegen.py) -> its rows."""

    def run(*words):
        cache = pytestconfig.cache.mkdir("triton")
        environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(cache), "PYTHONPATH": str(ROOT)}
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-m", "tests.unit.ragged.codegen", *map(str, words)],
            env=environment,
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return [json.loads(line) for line in done.stdout.splitlines()]

    return run


@pytest.mark.parametrize(
    ("capability", "tile_class", "more"),
    [
        (90, "large", ()),
        (80, "small", ODD),
        pytest.param(90, "large, few rows", ODD, marks=pytest.mark.campaign),
        pytest.param(80, "small", (), marks=pytest.mark.campaign),
        pytest.param(100, "large", (), marks=pytest.mark.campaign),
        pytest.param(90, "large", ODD, marks=pytest.mark.campaign),
        pytest.param(100, "large", ODD, marks=pytest.mark.campaign),
        pytest.param(100, "large, few rows", (), marks=pytest.mark.campaign),
        pytest.param(120, "small", (), marks=pytest.mark.campaign),
        pytest.param(90, "fp32", (), marks=pytest.mark.campaign),
        pytest.param(80, "fp32", (), marks=pytest.mark.campaign),
    ],
)
def test_machine_code(compiled, capability, tile_class, more):
    rows = compiled(capability, tile_class, *more)
    shared_bytes, tensor_cores = GPUS[capability]
    assert {row["kernel"] for row in rows} >= PRODUCTS | {"activation_grad"}
    assert sum(row["kernel"] == "weight_grad" for row in rows) == 4, "fc1 and fc2, written and added"
    for row in rows:
        print(row)
        assert row["spilled bytes"] <= SPILLED_BYTES.get((capability, tile_class), 0), row
        assert not row["serialized"], row
        if row["kernel"] in PRODUCTS:
            programs = 2 if row["BM"] == row["BN"] == 128 and row["num_warps"] == 4 else 1
            assert programs * (row["shared bytes"] + 1024) <= shared_bytes + 1024, row
            assert programs * row["registers"] * 32 * row["num_warps"] <= 65536, row
            assert row["async copies"] > 0 and row["16-byte stores"] > 0, row
            assert row[tensor_cores] > 0 or tile_class == "fp32", row
            assert (row["prefetches"] > 0) == bool(row.get("ACCUMULATE")), row
        elif row["kernel"] == "activation_grad":
            assert row["16-byte stores"] > 0, row
