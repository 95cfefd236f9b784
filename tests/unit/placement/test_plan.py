"""The plan and its file: coverage, round trip, and a reader that trusts nothing."""

import dataclasses
import json
import os
import random

import pytest

from hmoe_megatron.placement import Piece, PlacementPlan, contiguous_plan, plan_model, validate_pieces
from hmoe_megatron.placement.plan_checks import MAX_FILE_BYTES, checksum

WIDTHS = ((96, 160, 64), (32, 32, 256))


def made(ranks=2, **options):
    return plan_model([[5.0, 2.5, 0.0], [1, 1, 4]], WIDTHS, ranks, **options)


def rewritten(change):
    """A plan's text after `change(body)`, with a checksum that fits: what a careful forger writes."""
    body = json.loads(made().to_json())
    del body["sha256"]
    change(body)
    return json.dumps(body | {"sha256": checksum(body)})


@pytest.mark.parametrize("pieces, problem", [
    ([[(0, 0, 4)], [(1, 0, 6)]], None),
    ([[(0, 0, 4), (1, 2, 6)], [(1, 0, 2)], []], None),
    ([[(0, 0, 4)], []], "expert 1: [0:6) is placed nowhere"),
    ([[(0, 0, 3), (1, 0, 6)]], "expert 0: [3:4) is placed nowhere"),
    ([[(0, 1, 4), (1, 0, 6)]], "expert 0: [0:1) is placed nowhere"),
    ([[(0, 0, 4), (1, 0, 6)], [(1, 2, 5)]], "expert 1: [2:5) is placed twice"),
    ([[(0, 0, 4), (1, 0, 4)], [(1, 3, 6)]], "expert 1: [3:4) is placed twice"),
    ([[(0, 0, 4)], [(1, 0, 3), (1, 3, 6)]], "rank 1: 2 pieces of expert 1; join them into one"),
    ([[(0, 0, 4), (1, 0, 6), (2, 0, 1)]], "rank 0: expert 2 is not one of 0-1"),
    ([[(0, 0, 4), (1, 0, 6), (-1, 0, 1)]], "rank 0: expert -1 is not one of 0-1"),
    ([[(0, 0, 4), (1, 0, 7)]], "rank 0: expert 1 [0:7) is no range within its width 6"),
    ([[(0, 0, 4), (1, 0, 6)], [(1, 3, 3)]], "rank 1: expert 1 [3:3) is no range within its width 6"),
    ([], "0 ranks and 2 experts: one of each is the least"),
])
def test_validate_pieces(pieces, problem):
    found = validate_pieces([[Piece(*p) for p in rank] for rank in pieces], (4, 6))
    assert found == [] if problem is None else problem in found


def test_a_layer_plan_that_does_not_cover_cannot_be_made():
    layer = made().layers[0]
    with pytest.raises(ValueError, match="expert 0: .* nowhere; expert 1: .* nowhere; expert 2: .* nowhere"):
        dataclasses.replace(layer, pieces=((), ()))
    with pytest.raises(ValueError, match="2 loads for 3 experts"):
        dataclasses.replace(layer, tokens=(1.0, 1.0))
    with pytest.raises(ValueError, match="one layer or more"):
        PlacementPlan(())
    with pytest.raises(ValueError, match="same number of ranks"):
        PlacementPlan((layer, made(3).layers[0]))


def test_properties():
    layer = contiguous_plan([WIDTHS[0]], 5).layers[0]
    assert (layer.ranks, layer.slots_per_rank, layer.cuts) == (5, 1, 0) and layer.pieces[3] == ()
    assert contiguous_plan([WIDTHS[0]], 2).layers[0].slots_per_rank == 2
    assert contiguous_plan([WIDTHS[0]], 1).layers[0].pieces == (tuple(
        Piece(e, 0, F) for e, F in enumerate(WIDTHS[0])),)
    assert made().widths == WIDTHS and made().ranks == 2


@pytest.mark.parametrize("ranks", [1, 2, 7])
def test_round_trip(tmp_path, ranks):
    plan = made(ranks)
    assert PlacementPlan.from_json(plan.to_json()) == plan
    path = tmp_path / "plan.json"
    path.write_text("old")
    plan.save(path)
    assert PlacementPlan.load(path, WIDTHS, ranks) == plan
    assert PlacementPlan.load(path, [list(w) for w in WIDTHS], ranks).to_json() == plan.to_json()
    assert os.listdir(tmp_path) == ["plan.json"]


def test_a_save_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "plan.json"
    path.write_text("old")
    plan = made()

    def no_space(source, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", no_space)
    with pytest.raises(OSError, match="No space"):
        plan.save(path)
    assert os.listdir(tmp_path) == ["plan.json"] and path.read_text() == "old"


def test_every_mismatch_is_in_one_error(tmp_path):
    path = tmp_path / "plan.json"
    made().save(path)
    with pytest.raises(ValueError) as error:
        PlacementPlan.load(path, ((96, 160, 64), (32, 64, 224), (1, 1, 1)), 4)
    for words in (str(path), "made for 2 ranks, but --expert-model-parallel-size 4",
                  "2 MoE layers, the model has 3", "other widths (--hmoe-widths) in layers 1: [32, 32, 256] "
                  "in layer 1, the model has [32, 64, 224]"):
        assert words in str(error.value)


def first(body):
    return body["layers"][0]


@pytest.mark.parametrize("change, words", [
    (lambda b: b.update(schema=2), "schema 2: this version reads 1"),
    (lambda b: b.update(schema=True), "schema True"),
    (lambda b: b.update(more=1), "unknown field 'more'"),
    (lambda b: b.pop("layers"), "field 'layers' is missing"),
    (lambda b: b.update(layers=[]), "layers is not a list"),
    (lambda b: b.update(ep_size=3), "not a list for each of 3 ranks"),
    (lambda b: b.update(ep_size=10**9), "ep_size 1000000000"),
    (lambda b: b.update(ep_size=True), "ep_size True"),
    (lambda b: b.update(widths_fingerprint="0" * 16), "is not that of its widths"),
    (lambda b: b.update(widths_fingerprint=None), "widths_fingerprint is not text"),
    (lambda b: b["layers"].append(None), "layer 2 is not a JSON object"),
    (lambda b: b["layers"][1].update(more=1), "layer 1: unknown field 'more'"),
    (lambda b: b["layers"][1].pop("tokens"), "layer 1: field 'tokens' is missing"),
    (lambda b: first(b).update(widths=[96, 160, 64.0]), "layer 0: widths is not"),
    (lambda b: first(b).update(widths=[96, 160, True]), "layer 0: widths is not"),
    (lambda b: first(b).update(widths=[96, 160, 0]), "layer 0: widths is not"),
    (lambda b: first(b).update(tokens=[1, 2]), "layer 0: tokens is not"),
    (lambda b: first(b).update(tokens=[1, 2, -1]), "layer 0: tokens is not"),
    (lambda b: first(b).update(tokens=[1, 2, False]), "layer 0: tokens is not"),
    (lambda b: first(b)["predicted"].update(bound="1"), "predicted bound is not"),
    (lambda b: first(b)["predicted"].update(params=[1.5, 2]), "predicted params is not"),
    (lambda b: first(b)["predicted"].update(more=[1, 2]), "layer 0 predicted: unknown field 'more'"),
    (lambda b: first(b).update(predicted=None), "layer 0 predicted is not a JSON object"),
    (lambda b: first(b)["pieces"][0].pop(), "is placed nowhere"),
    (lambda b: first(b)["pieces"][0].append([0, 0]), "layer 0: pieces is not"),
    (lambda b: first(b)["pieces"][0].append([0, 0, True]), "layer 0: pieces is not"),
    (lambda b: first(b)["pieces"][0].append([7, 0, 1]), "expert 7 is not one of 0-2"),
    (lambda b: [layer["pieces"][0].clear() for layer in b["layers"]], "; layer 1: placement of a layer: expert"),
])
def test_a_forged_plan_is_refused(change, words):
    with pytest.raises(ValueError) as error:
        PlacementPlan.from_json(rewritten(change))
    assert words in str(error.value) and len(str(error.value)) < 4000


@pytest.mark.parametrize("text, words", [
    ("", "not read as JSON"),
    ("[]", "the file is not a JSON object"),
    ('{"schema": 1, "schema": 1}', "a field is there twice"),
    ('{"schema": NaN}', "NaN is no number here"),
    ('{"schema": -Infinity}', "-Infinity is no number here"),
    ('{"schema": %s}' % ("9" * 5000), "not read as JSON"),
    ("[" * 200_000, "nested too deeply"),
    (" " * (MAX_FILE_BYTES + 1), "too large"),
])
def test_what_is_no_plan_is_refused(text, words):
    with pytest.raises(ValueError, match="^placement plan: ") as error:
        PlacementPlan.from_json(text)
    assert words in str(error.value)


def test_deep_nesting_in_any_field_is_refused():
    for depth in (10, 300, 900, 5_000, 50_000):
        for name in ("schema", "ep_size", "widths_fingerprint", "layers"):
            body = json.loads(made().to_json())
            text = json.dumps(body | {name: "HERE"}).replace('"HERE"', "[" * depth + "]" * depth)
            with pytest.raises(ValueError):
                PlacementPlan.from_json(text)


def test_an_infinite_number_is_refused():
    text = made().to_json().replace('"tokens":[5.0', '"tokens":[1e999', 1)
    assert "1e999" in text
    with pytest.raises(ValueError, match="layer 0: tokens is not"):
        PlacementPlan.from_json(text)


def test_unreadable_files_are_refused(tmp_path):
    (tmp_path / "binary").write_bytes(b"\x80\xff")
    os.mkfifo(tmp_path / "pipe")
    for name, words in (("none", "No such file"), ("pipe", "not a regular file"), ("", "not a regular file"),
                        ("binary", "not UTF-8"), ("nul\0", "null")):
        with pytest.raises(ValueError, match=words):
            PlacementPlan.load(os.path.join(tmp_path, name), WIDTHS, 2)


@pytest.mark.parametrize("seed", range(20))
def test_an_altered_file_is_refused_or_the_same_plan(seed):
    """Bytes and values changed at random: ValueError or an equal plan, never another error or another plan."""
    rng = random.Random(seed)
    plan, text = made(), made().to_json()
    kept = 0
    for _ in range(100):
        if rng.random() < 0.5:
            chars = list(text)
            for _ in range(rng.randint(1, 3)):
                at = rng.randrange(len(chars))
                chars[at:at + rng.randint(0, 2)] = rng.choice(["", " ", "0", "9", "-", "[", "]", "{}", ",", '"', ".",
                                                               "e5", "\x00", "\ud800", "true", "null", "1e999"])
            altered = "".join(chars)
        else:
            body = json.loads(text)
            node, key = body, rng.choice(list(body))
            while isinstance(node[key], (list, dict)) and node[key] and rng.random() < 0.85:
                node = node[key]
                key = rng.choice(list(node)) if isinstance(node, dict) else rng.randrange(len(node))
            node[key] = rng.choice([None, True, 0, 1, -1, 2**70, 0.5, 1e308, "x", [], {}, [[]], "\ud800"])
            altered = json.dumps(body)
        try:
            read = PlacementPlan.from_json(altered)
        except ValueError as error:
            assert len(str(error)) < 4000
        else:
            assert read == plan
            kept += 1
    assert kept < 100
