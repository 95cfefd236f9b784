"""A fuzz of the plan reader: whatever the text is, a ValueError with a short message or a plan that holds."""

import contextlib
import copy
import hashlib
import json
import math
import random
import re
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hmoe_megatron.placement import (
    CostModel,
    LayerPlan,
    Piece,
    PlacementPlan,
    Profile,
    Rank,
    plan_table,
    validate_pieces,
)
from hmoe_megatron.placement.cost import predict
from hmoe_megatron.placement.plan_checks import MAX_PROBLEM_CHARS, MAX_PROBLEMS
from hmoe_megatron.widths import widths_fingerprint
from tests.unit.placement.hostile_json import BYTES, JSON

MAX_MESSAGE = (MAX_PROBLEMS + 1) * MAX_PROBLEM_CHARS
AMOUNT, WHOLE = (int, float), (int,)

COST = CostModel(
    Profile(
        "made up",
        1e12,
        launch_s=1e-5,
        memory_bytes_per_s=1e12,
        row_tile=8,
        width_tile=16,
        intra_node_bytes_per_s=1e11,
        inter_node_bytes_per_s=1e10,
        sources={"flops_per_s": "made up"},
    ),
    hidden_size=64,
    expert_data_parallel_size=2,
    live_micro_batches=1.5,
)
RANKS = (Rank(0, 1.0, 10**8), Rank(0, 0.5, 10**9), Rank(1, 2.0, None))
PIECES = (
    ((Piece(0, 0, 96), Piece(1, 32, 160)), (Piece(1, 0, 32),), (Piece(2, 0, 64),)),
    ((Piece(1, 0, 256),), (), (Piece(0, 0, 32),)),
)


def made() -> PlacementPlan:
    layers = []
    for pieces, widths, tokens in zip(PIECES, ((96, 160, 64), (32, 256)), ((5.0, 2.5, 0.0), (1.0, 4.0)), strict=True):
        layers.append(LayerPlan(pieces, widths, tokens, predict(pieces, tokens, COST, RANKS, 1e-6)))
    return PlacementPlan(tuple(layers), COST, RANKS, (0, 1))


PLAN = made()
BODY = json.loads(PLAN.to_json())


def refitted(body) -> str:
    """Text of a body with a checksum that fits, as a careful forger writes it; it may hold NaN."""
    content = {name: value for name, value in body.items() if name != "sha256"}
    if "sha256" in body:
        text = json.dumps(content, sort_keys=True, separators=(",", ":"))
        content["sha256"] = hashlib.sha256(text.encode()).hexdigest()
    return json.dumps(content)


def read(text) -> PlacementPlan | None:
    """The plan of a text; None for one that is refused as it should be."""
    try:
        plan = PlacementPlan.from_json(text)
    except ValueError as error:
        message = str(error)
        assert message.startswith("placement plan: ") and len(message) <= MAX_MESSAGE and message.isprintable()
        return None
    check(plan)
    return plan


def check(plan) -> None:
    """What must hold for a plan that the reader lets through."""
    held = Counter()
    for stage, layer in zip(plan.stages, plan.layers, strict=True):
        assert validate_pieces(layer.pieces, layer.widths) == []
        experts = [(rank, piece.expert) for rank, pieces in enumerate(layer.pieces) for piece in pieces]
        assert len(set(experts)) == len(experts) and units(layer.pieces) == [
            (e, unit) for e, F in enumerate(layer.widths) for unit in range(F)
        ]
        assert layer.ranks == plan.ranks == len(plan.rank_specs) and len(layer.tokens) == len(layer.widths)
        for pieces in layer.pieces:
            assert all_of(WHOLE, 0, 2**31, [n for p in pieces for n in (p.expert, p.lo, p.hi)])
        assert all_of(WHOLE, 1, 2**31, layer.widths) and all_of(AMOUNT, 0, 1e18, layer.tokens)
        for name, amounts in vars(layer.predicted).items():
            amounts = [amounts] if name == "bound" else amounts
            assert len(amounts) == (1 if name == "bound" else plan.ranks)
            assert all_of(WHOLE if name in ("params", "bytes") else AMOUNT, 0, 1e300, amounts)
        counted = predict(layer.pieces, layer.tokens, plan.cost, plan.rank_specs, 0.0)
        assert all(all_of(AMOUNT, 0, 1e300, getattr(counted, name)) for name in ("time", "flops", "bytes"))
        held.update({(stage, rank): amount for rank, amount in enumerate(counted.bytes)})
    for (_, rank), amount in held.items():
        cap = plan.rank_specs[rank].bytes
        assert cap is None or amount <= cap
    assert all_of(WHOLE, 0, 4096, plan.stages)
    assert plan_table(plan) and PlacementPlan.from_json(plan.to_json()) == plan


def units(pieces) -> list[tuple[int, int]]:
    """Every width unit that is placed; an empty piece counts as one."""
    return sorted((p.expert, unit) for rank in pieces for p in rank for unit in range(p.lo, max(p.hi, p.lo + 1)))


def all_of(types, least, most, values) -> bool:
    return all(type(value) in types and least <= value <= most for value in values)


def paths(node, path=()):
    """Path of every value in parsed JSON."""
    yield path
    for key in node if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ():
        yield from paths(node[key], (*path, key))


def at(node, path):
    for key in path:
        node = node[key]
    return node


def changed(path, change) -> str:
    """Text of the plan after change(container, key) of the value at `path`, with a checksum that fits."""
    body = copy.deepcopy(BODY)
    change(at(body, path[:-1]), path[-1])
    if path[0] == "layers" and "widths" in path:
        with contextlib.suppress(KeyError, TypeError):  # the fingerprint shall not be what is refused
            body["widths_fingerprint"] = widths_fingerprint([layer["widths"] for layer in body["layers"]])
    return refitted(body)


def replaced(path, value) -> str:
    return changed(path, lambda node, key: node.__setitem__(key, value))


VALUES = [path for path in paths(BODY) if path and path != ("sha256",)]
OF_FREE_NAMES = [path for path in VALUES if "sources" in path]


def test_the_plan_itself_is_read():
    assert read(PLAN.to_json()) == read(refitted(BODY)) == PLAN and len(VALUES) > 100


@pytest.mark.parametrize(
    "change",
    [
        lambda node, key: node.__delitem__(key),
        lambda node, key: (
            node.insert(key, node[key]) if isinstance(node, list) else node.__setitem__("more", node[key])
        ),
    ],
    ids=["missing", "doubled"],
)
def test_nothing_can_be_missing_or_added(change):
    for path in VALUES:
        plan = read(changed(path, change))
        assert plan is None or path in OF_FREE_NAMES, path


def test_no_field_is_there_twice():
    fields = re.findall(r'"\w+":', PLAN.to_json())
    assert len(fields) > 40
    for field in fields:
        assert read(PLAN.to_json().replace(field, f"{field}0,{field}")) is None, field


def kind(value) -> str:
    return "number" if type(value) in (int, float) else type(value).__name__


OTHER = [None, True, False, "", "0", "\ud800\x1b[31m" * 100, [], {}, [[]], [None] * 5000, {"a": {}}]


@pytest.mark.parametrize("value", OTHER, ids=lambda value: repr(value)[:12])
def test_no_value_changes_its_type(value):
    for path in VALUES:
        old = at(BODY, path)
        plan = read(replaced(path, value))
        nullable = path[0] == "cost" or (path[0] == "ranks" and path[-1] == 2)
        if kind(value) != kind(old):
            assert plan is None or {kind(value), kind(old)} == {"number", "NoneType"} and nullable, path
        elif value != old:
            assert plan is None or path[0] == "cost", path


HUGE = [2**31, 2**63, 2**70, 1e19, 1e308, 10**400, -(10**400), int("9" * 4300)]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, -1, -0.5, 0, 0.5, 1, 5e-324, *HUGE])
def test_numbers_out_of_range(value):
    for path in VALUES:
        old, plan = at(BODY, path), read(replaced(path, value))
        free = path[0] in ("cost", "ranks") or "predicted" in path or "tokens" in path or path[0] == "stages"
        if value != old:
            assert plan is None or free, path
        if isinstance(value, float) and not math.isfinite(value):
            assert plan is None, path
        if value < 0:
            assert plan is None or path[0] == "ranks" and path[-1] == 0, path
        if abs(value) >= 2**31 and path[0] != "cost":
            amount = "predicted" in path or path[0] == "ranks" and path[-1] == 2 or "tokens" in path and value <= 1e18
            assert plan is None or amount, path


@pytest.mark.parametrize("depth", [3, 100, 900, 5_000, 50_000])
@pytest.mark.parametrize("pair", ["[]", ('{"a":', "0", "}")], ids=["lists", "objects"])
def test_nesting_in_any_field(depth, pair):
    opened, closed = pair[0] * depth, (pair[1] if len(pair) == 3 else "") + pair[-1] * depth
    for path in VALUES:
        if len(path) < 4 or depth == 900:
            assert read(replaced(path, "HERE").replace('"HERE"', opened + closed)) is None or path in OF_FREE_NAMES


def edit_pieces(rng, ranks) -> None:
    """One change of the pieces of a layer; some leave a placement."""
    held = rng.choice([rank for rank in ranks if rank])
    other, place = rng.choice(ranks), rng.randrange(len(held))
    e, lo, hi = held[place]
    between = rng.choice([lo, lo, hi, rng.randint(lo, hi)])
    match rng.randrange(6):
        case 0:
            other.append(held.pop(place))
        case 1:  # cut in two, which may be empty or stay on one rank
            held[place] = [e, lo, between]
            other.append([e, between, hi])
        case 2:
            held[place] = [e, max(0, lo + rng.choice([-1, 0, 1])), hi + rng.choice([-1, 0, 1])]
        case 3:
            held[place] = [rng.randint(0, 3), lo, hi]
        case 4:
            other.append([e, between, between])
        case 5:
            ranks.sort(key=lambda _: rng.random())


@pytest.mark.parametrize("seed", range(4))
def test_edited_pieces(seed):
    rng, kept = random.Random(seed), 0
    for _ in range(150):
        body = copy.deepcopy(BODY)
        body["ranks"] = [[0, 1.0, None]] * 3
        for _ in range(rng.randint(1, 3)):
            edit_pieces(rng, rng.choice(body["layers"])["pieces"])
        kept += read(refitted(body)) is not None
    assert 10 < kept < 140


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("fit", [False, True], ids=["as it is", "checksum made to fit"])
def test_altered_characters(seed, fit):
    rng, text, kept = random.Random(seed), PLAN.to_json(), 0
    for _ in range(150):
        chars = list(text)
        for _ in range(rng.randint(1, 3)):
            place = rng.randrange(len(chars))
            chars[place : place + rng.choice((0, 1, 1, 2, 40))] = rng.choice(BYTES)
        altered = "".join(chars)
        if fit:
            try:
                altered = refitted(json.loads(altered))
            except (ValueError, AttributeError):
                continue
        plan = read(altered)
        assert fit or plan in (None, PLAN)  # a space, or 0.50 for 0.5
        kept += plan is not None
    assert kept < 150


@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(st.text() | JSON.map(json.dumps))
def test_what_is_no_plan(text):
    assert read(text) is None


@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(st.lists(st.tuples(st.sampled_from(VALUES), JSON), min_size=1, max_size=3))
def test_any_json_in_any_field(changes):
    body = copy.deepcopy(BODY)
    for path, value in changes:
        with contextlib.suppress(KeyError, IndexError, TypeError):  # an earlier change took the place away
            place = at(body, path[:-1])
            if isinstance(place, dict) == isinstance(path[-1], str):  # else it would be no JSON
                place[path[-1]] = value
    read(refitted(body))
