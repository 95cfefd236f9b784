"""Bytes of a plan's file, and memory that reading a file may take whatever is in it."""

import json
import tracemalloc

import numpy as np
import pytest

from hmoe_megatron.placement import PlacementPlan, contiguous_plan, nodes_of
from hmoe_megatron.placement.plan_checks import MAX_PROBLEM_CHARS, MAX_PROBLEMS

BYTES_A_RANK = 128  # and layer, with one expert on each: 64 MiB hold 500,000 of them
MEMORY_RATIO = 60  # bytes for a byte of text: an empty object is 3 characters and takes 72 bytes, a piece 8 and 450
SIZE = 1 << 17
MANY = {
    "lists": "[" + "[]," * (SIZE // 3) + "[]]",
    "objects": "[" + "{}," * (SIZE // 3) + "{}]",
    "numbers": "[" + "1.5," * (SIZE // 4) + "0]",
    "texts": "[" + '"ab",' * (SIZE // 5) + "0]",
    "fields": "{" + ",".join(f'"{n}":{n}' for n in range(SIZE // 14)) + "}",
    "pieces": "[" + "[[0,0,1]]," * (SIZE // 10) + "[]]",
    "doubled pieces": "[[" + "[0,0,9]," * (SIZE // 8) + "[0,0,1]],[],[]]",
    "digits": "9" * SIZE,
    "text": '"' + "x" * SIZE + '"',
}


def test_a_large_plan_has_a_small_file():
    rng, ranks, layers = np.random.default_rng(0), 256, 8
    plan = contiguous_plan([[64] * 256] * layers, nodes_of(ranks // 8, 8, 80 << 30), rng.lognormal(7, 1, (layers, 256)))
    text = plan.to_json()
    assert len(text) < BYTES_A_RANK * ranks * layers and PlacementPlan.from_json(text) == plan


@pytest.mark.parametrize(
    "path",
    [
        (),
        ("schema",),
        ("widths_fingerprint",),
        ("cost",),
        ("cost", "profile"),
        ("ranks",),
        ("stages",),
        ("layers",),
        ("layers", 0),
        ("layers", 0, "pieces"),
        ("layers", 0, "tokens"),
        ("layers", 0, "predicted"),
    ],
    ids=str,
)
@pytest.mark.parametrize("many", MANY)
def test_memory_is_bounded_by_the_size_of_the_file(path, many):
    body = {"body": json.loads(contiguous_plan([[96, 160, 64]], 3).to_json())}
    node, key = body, "body"
    for name in path:
        node, key = node[key], name
    node[key] = "HERE"
    text = json.dumps(body["body"]).replace('"HERE"', MANY[many])
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match="^placement plan: ") as error:
            PlacementPlan.from_json(text)
        assert len(str(error.value)) <= (MAX_PROBLEMS + 1) * MAX_PROBLEM_CHARS
        assert tracemalloc.get_traced_memory()[1] < MEMORY_RATIO * len(text)
    finally:
        tracemalloc.stop()
