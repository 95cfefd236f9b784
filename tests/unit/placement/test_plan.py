"""The plan and its file: coverage, round trip, and a reader that trusts nothing."""

import dataclasses
import json
import os

import numpy as np
import pytest

from hmoe_megatron.placement import (
    CostModel,
    LayerPlan,
    Piece,
    PlacementPlan,
    Profile,
    Rank,
    contiguous_plan,
    nodes_of,
    validate_pieces,
)
from hmoe_megatron.placement.cost import predict
from hmoe_megatron.placement.plan_checks import MAX_FILE_BYTES, MAX_NESTS
from hmoe_megatron.untrusted import checksum

WIDTHS = ((96, 160, 64), (32, 32, 256))
TOKENS = ((5.0, 2.5, 0.0), (1.0, 1.0, 4.0))
COST = CostModel(
    Profile("made up", 1e12, memory_bytes_per_s=1e12, inter_node_bytes_per_s=1e10),
    hidden_size=64,
    live_micro_batches=0.5,
)


def made(ranks=2, cost=None, stages=()):
    """Two layers; the widest expert of each is cut where there is a rank for the other half."""
    specs = ranks if isinstance(ranks, tuple) else (Rank(),) * ranks
    layers, cost = [], cost or CostModel()
    for widths, tokens in zip(WIDTHS, TOKENS, strict=True):
        pieces = [[] for _ in specs]
        for e, F in enumerate(widths):
            half = F // 2 if len(specs) > 1 and max(widths) == F else F
            pieces[e % len(specs)].append(Piece(e, 0, half))
            if half < F:
                pieces[(e + 1) % len(specs)].append(Piece(e, half, F))
        pieces = tuple(map(tuple, pieces))
        layers.append(LayerPlan(pieces, widths, tokens, predict(pieces, tokens, cost, specs, 0.5)))
    return PlacementPlan(tuple(layers), cost, specs, stages)


@pytest.mark.parametrize(("ranks", "ep_size"), [(4, 2), (2, 4)])
def test_a_plan_for_other_ranks_is_refused(ranks, ep_size):
    with pytest.raises(ValueError, match=f"made for {ranks} ranks, but --expert-model-parallel-size {ep_size}"):
        PlacementPlan.from_json(made(ranks).to_json(), ep_size=ep_size)


def unequal(layers=2):
    """Three ranks of two nodes, without a cap on the last."""
    return made((Rank(0, 0.5, 1 << 40), Rank(0, 2.0, 10**9), Rank(1)), COST, range(layers))


def rewritten(change):
    """A plan's text after `change(body)`, with a checksum that fits: what a careful forger writes."""
    body = json.loads(made().to_json())
    del body["sha256"]
    change(body)
    return json.dumps(body | {"sha256": checksum(body)})


@pytest.mark.parametrize(
    "pieces, problem",
    [
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
    ],
)
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
    with pytest.raises(ValueError, match="3 rank descriptions for 2 ranks, 1 stages for 1 layers"):
        PlacementPlan((layer,), rank_specs=(Rank(),) * 3)
    with pytest.raises(ValueError, match="2 stages for 1 layers"):
        PlacementPlan((layer,), stages=(0, 1))
    for stage in (0.5, -1, 5000, "0", None):
        with pytest.raises(ValueError, match="stages .* are not whole numbers"):
            PlacementPlan((layer,), stages=(stage,))
    with pytest.raises(ValueError, match="or a Rank for each"):
        PlacementPlan((layer,), rank_specs=(0, 0))


def test_properties():
    layer = contiguous_plan([WIDTHS[0]], 5).layers[0]
    assert (layer.ranks, layer.slots_per_rank, layer.cuts) == (5, 1, 0) and layer.pieces[3] == ()
    assert contiguous_plan([WIDTHS[0]], 2).layers[0].slots_per_rank == 2
    assert contiguous_plan([WIDTHS[0]], 1).layers[0].pieces == (tuple(Piece(e, 0, F) for e, F in enumerate(WIDTHS[0])),)
    assert made().widths == WIDTHS and made().ranks == 2


@pytest.mark.parametrize("plan", [made(1), made(2), made(7), made(8, COST), unequal(), made(nodes_of(2, 2, 1 << 60))])
def test_round_trip(tmp_path, plan):
    read = PlacementPlan.from_json(plan.to_json())
    assert read == plan and read.to_json() == plan.to_json()
    assert (read.cost, read.rank_specs, read.stages) == (plan.cost, plan.rank_specs, plan.stages)
    numbered = dataclasses.replace(plan, numbers=tuple(range(3, 3 + len(plan.layers))))
    assert PlacementPlan.from_json(numbered.to_json()) == numbered != plan
    ranks = plan.ranks
    path = tmp_path / "plan.json"
    path.write_text("old")
    plan.save(path)
    assert PlacementPlan.load(path, WIDTHS, ranks) == plan
    assert PlacementPlan.load(path, [list(w) for w in WIDTHS], ranks).to_json() == plan.to_json()
    assert os.listdir(tmp_path) == ["plan.json"]


def test_equal_plans_have_equal_texts():
    specs = (Rank(np.int64(1), 1, np.int64(10**9)), Rank(0, np.float32(0.5)))
    plan = made(specs, stages=np.array([0, 1]))
    assert plan.to_json() == made((Rank(1, 1.0, 10**9), Rank(0, 0.5)), stages=(0, 1)).to_json()


def bytes_held(plan, stage, rank):
    """Of COST, in which every piece takes a whole number."""
    held = 0.0
    for layer, its_stage in zip(plan.layers, plan.stages, strict=True):
        piece_bytes, width_bytes = plan.cost.memory(layer.tokens)
        if its_stage == stage:
            held += sum(piece_bytes[p.expert] + width_bytes[p.expert] * p.width for p in layer.pieces[rank])
    assert held.is_integer()
    return int(held)


@pytest.mark.parametrize("stages", [(0, 0), (0, 1), (3, 1)])
def test_a_plan_over_the_memory_of_its_ranks_is_refused(stages):
    def capped(caps):
        return made(tuple(Rank(bytes=cap) for cap in caps), COST, stages)

    free = capped((None,) * 3)
    assert free.missing_bytes() == {}
    held = {(stage, rank): bytes_held(free, stage, rank) for stage in stages for rank in range(3)}
    most = [max(held[stage, rank] for stage in stages) for rank in range(3)]
    fits = capped(most)
    assert fits.missing_bytes() == {} and PlacementPlan.from_json(fits.to_json()) == fits
    for rank in range(3):
        caps = [cap if r == rank else None for r, cap in enumerate(most)]
        for less in (1, 1000, caps[rank]):
            over = capped([cap and cap - less for cap in caps])
            missing = {
                where: amount - caps[rank] + less
                for where, amount in sorted(held.items())
                if where[1] == rank and amount > caps[rank] - less
            }
            assert missing and over.missing_bytes() == missing
            with pytest.raises(ValueError) as error:
                PlacementPlan.from_json(over.to_json())
            for stage, _ in missing:
                assert (
                    f"rank {rank} lacks {missing[stage, rank]} bytes, of {caps[rank] - less}, in pipeline stage "
                    f"{stage}; make the plan again"
                ) in str(error.value)


def test_what_a_file_predicts_is_not_trusted():
    """Bytes that it claims to need neither save nor condemn a plan."""

    def claims(body, amount, cap):
        for layer in body["layers"]:
            layer["predicted"]["bytes"] = [amount] * 2
        body["ranks"] = [[0, 1.0, cap]] * 2

    with pytest.raises(ValueError, match="rank 0 lacks .* rank 1 lacks"):
        PlacementPlan.from_json(rewritten(lambda body: claims(body, 0, 10)))
    assert PlacementPlan.from_json(rewritten(lambda body: claims(body, 10**12, 10**9))).missing_bytes() == {}


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
    for words in (
        str(path),
        "made for 2 ranks, but --expert-model-parallel-size 4",
        "2 MoE layers, the model has 3",
        "other widths (--hmoe-widths) in layers 1: [32, 32, 256] in layer 1, the model has [32, 64, 224]",
    ):
        assert words in str(error.value)


def first(body):
    return body["layers"][0]


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda b: b.update(schema=1), "schema 1: this version reads 3; make the plan again"),
        (
            lambda b: (b.clear(), b.update(schema=1, ep_size=2, layers=[])),
            "schema 1: this version reads 3; make the plan",
        ),
        (lambda b: b.update(schema=2), "schema 2: this version reads 3"),
        (lambda b: b.update(schema=True), "schema True"),
        (lambda b: b.update(more=1), "unknown field 'more'"),
        (lambda b: b.pop("layers"), "field 'layers' is missing"),
        (lambda b: b.update(layers=[]), "layers is not a list"),
        (lambda b: b["ranks"].append([0, 1.0, None]), "not a list for each of 3 ranks"),
        (lambda b: b.update(ranks=[[0, 1.0, None]] * 70_000), "ranks is not a list of 1 to 65536"),
        (lambda b: b.update(ranks=[[0, 1.0], [0, 1.0]]), "ranks is not"),
        (lambda b: b.update(ranks=[[0, 1.0, True]] * 2), "ranks is not"),
        (
            lambda b: b.update(ranks=[[0, 1.0, None], [0, 0.0, -1]]),
            "ranks[1]: rank Rank(node=0, speed=0.0, bytes=-1): ",
        ),
        (lambda b: b.update(ranks=[[0, 1.0, int("9" * 4200)]] * 2), "ranks[1]: rank Rank(node=0, speed=1.0, bytes=999"),
        (lambda b: b.update(stages=[0]), "stages is not a list of 2"),
        (lambda b: b.update(stages=[0, 0.0]), "stages is not"),
        (lambda b: b.update(stages=[0, -1]), "stages is not"),
        (lambda b: b.update(numbers=[3, 2]), "numbers is not a list of 2 rising"),
        (lambda b: b.update(numbers=[0, 4096]), "numbers is not a list of 2 rising whole numbers, 0 to 4095"),
        (lambda b: b.update(cost=None), "cost: "),
        (lambda b: b["cost"].update(more=1), "cost: "),
        (lambda b: b["cost"].update(hidden_size=0), "cost: "),
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
        (lambda b: first(b).update(tokens=[1, 2, 1e19]), "layer 0: tokens is not"),
        (lambda b: first(b)["predicted"].update(bound="1"), "predicted bound is not"),
        (lambda b: first(b)["predicted"].update(params=[1.5, 2]), "predicted params is not"),
        (lambda b: first(b)["predicted"].update(more=[1, 2]), "layer 0 predicted: unknown field 'more'"),
        (lambda b: first(b).update(predicted=None), "layer 0 predicted is not a JSON object"),
        (lambda b: first(b)["pieces"][0].pop(), "is placed nowhere"),
        (lambda b: first(b)["pieces"][0].append([0, 0]), "layer 0: pieces is not"),
        (lambda b: first(b)["pieces"][0].append([0, 0, True]), "layer 0: pieces is not"),
        (lambda b: first(b)["predicted"].update(bytes=[1.5, 2]), "predicted bytes is not"),
        (lambda b: first(b)["predicted"].update(time=[1, 2, 3]), "predicted time is not"),
        (lambda b: first(b)["pieces"][0].append([7, 0, 1]), "expert 7 is not one of 0-2"),
        (
            lambda b: (b["layers"].append(None), b.update(sha256=1)),
            "numbers is not a list of 3 rising whole numbers, 0 to 4095; layer 2 is not",
        ),
        (lambda b: [layer["pieces"][0].clear() for layer in b["layers"]], "; layer 1: expert"),
    ],
)
def test_a_forged_plan_is_refused(change, words):
    with pytest.raises(ValueError) as error:
        PlacementPlan.from_json(rewritten(change))
    assert words in str(error.value) and len(str(error.value)) < 4000


@pytest.mark.parametrize(
    "text, words",
    [
        ("", "not read as JSON"),
        ("[]", "the file is not a JSON object"),
        ('{"schema": 1, "schema": 1}', "a field is there twice"),
        ('{"schema": NaN}', "NaN is no number here"),
        ('{"schema": -Infinity}', "-Infinity is no number here"),
        ('{"schema": %s}' % ("9" * 5000), "not read as JSON"),
        ("[" * 200_000, "nested too deeply"),
        (" " * (MAX_FILE_BYTES + 1), f"over {MAX_FILE_BYTES} characters, too large"),
        ("[" + "[]," * MAX_NESTS + "{}]", f"over {MAX_NESTS} lists and objects, too large"),
    ],
)
def test_what_is_no_plan_is_refused(text, words):
    with pytest.raises(ValueError, match="^placement plan: ") as error:
        PlacementPlan.from_json(text)
    assert words in str(error.value)


def test_an_infinite_number_is_refused():
    text = made().to_json().replace('"tokens":[5.0', '"tokens":[1e999', 1)
    assert "1e999" in text
    with pytest.raises(ValueError, match="layer 0: tokens is not"):
        PlacementPlan.from_json(text)


def test_unreadable_files_are_refused(tmp_path):
    (tmp_path / "binary").write_bytes(b"\x80\xff")
    os.mkfifo(tmp_path / "pipe")
    for name, words in (
        ("none", "No such file"),
        ("pipe", "not a regular file"),
        ("", "not a regular file"),
        ("binary", "not UTF-8"),
        ("nul\0", "null"),
    ):
        with pytest.raises(ValueError, match=words):
            PlacementPlan.load(os.path.join(tmp_path, name), WIDTHS, 2)
