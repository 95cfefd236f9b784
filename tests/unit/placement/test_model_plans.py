"""Plans over layers: bytes evened out, caps shared in a pipeline stage, an old plan kept where it can be."""

import random

import numpy as np
import pytest

from hmoe_megatron.placement import (
    CostModel,
    InfeasiblePlan,
    Rank,
    contiguous_plan,
    nodes_of,
    plan_layer,
    plan_model,
    validate_pieces,
)
from hmoe_megatron.placement.planner import overflow, under
from hmoe_megatron.placement.solver import EQUAL_TIME
from tests.rows import rarely

COST = CostModel(hidden_size=64, expert_data_parallel_size=4)


def random_model(seed, layers):
    rng = np.random.default_rng(seed)
    widths_LE = [rng.integers(1, 600, rng.integers(2, 24)).tolist() for _ in range(layers)]
    tokens_LE = [(rng.lognormal(3, 1, len(w)) * (rng.random(len(w)) < 0.8)).tolist() for w in widths_LE]
    return tokens_LE, widths_LE


def held_bytes(plan, stage=0):
    layers = [layer for layer, of in zip(plan.layers, plan.stages, strict=True) if of == stage]
    return np.sum([layer.predicted.bytes for layer in layers], axis=0)


@pytest.mark.parametrize("seed", range(20))
def test_each_layer_is_as_fast_as_alone_and_bytes_even_out(seed):
    tokens_LE, widths_LE = random_model(seed, layers=8)
    plan = plan_model(tokens_LE, widths_LE, 6, COST)
    alone = [plan_layer(t, w, 6, COST) for t, w in zip(tokens_LE, widths_LE, strict=True)]
    for layer, single, widths in zip(plan.layers, alone, widths_LE, strict=True):
        assert validate_pieces(layer.pieces, widths) == []
        assert sorted(layer.predicted.time) == sorted(single.predicted.time)
    as_planned = np.sum([layer.predicted.bytes for layer in alone], axis=0)
    assert held_bytes(plan).max() <= as_planned.max() and held_bytes(plan).sum() == as_planned.sum()


@pytest.mark.parametrize("stages", [(0,) * 6, (0, 0, 0, 1, 1, 1), (0, 1, 2, 0, 1, 2)])
@pytest.mark.parametrize("seed", [0, *rarely(*range(1, 10))])
def test_the_layers_of_a_stage_share_a_ranks_bytes(seed, stages):
    tokens_LE, widths_LE = random_model(seed, layers=6)
    free = plan_model(tokens_LE, widths_LE, 5, COST, stages=stages)
    for slack in (1.02, 1.2):
        need = max(held_bytes(free, stage).sum() for stage in set(stages))
        ranks = [Rank(bytes=int(need / 5 * slack)) for _ in range(5)]
        plan = plan_model(tokens_LE, widths_LE, ranks, COST, stages=stages)
        for stage in set(stages):
            assert held_bytes(plan, stage).max() <= ranks[0].bytes
        assert plan == plan_model(tokens_LE, widths_LE, ranks, COST, stages=stages)


def test_unequal_caps_and_speeds():
    tokens_LE, widths_LE = random_model(3, layers=4)
    need = held_bytes(plan_model(tokens_LE, widths_LE, 1, COST))[0]
    ranks = [Rank(bytes=int(need * share), speed=speed) for share, speed in ((0.6, 1), (0.3, 1), (0.2, 4))]
    plan = plan_model(tokens_LE, widths_LE, ranks, COST)
    assert not overflow(plan.layers, ranks)
    assert overflow(plan_model(tokens_LE, widths_LE, [Rank(speed=rank.speed) for rank in ranks], COST).layers, ranks)


def test_what_cannot_fit_says_where_how_much_and_what_would_help():
    tokens_LE, widths_LE = [[4, 4]] * 2, [[100, 100]] * 2
    with pytest.raises(InfeasiblePlan) as error:
        plan_model(tokens_LE, widths_LE, [Rank(bytes=1000)] * 2, COST, max_cuts=0)
    text = str(error.value)
    assert "layers 0-1: " in text and "rank 0 lacks" in text and "rank 1 lacks" in text
    for remedy in ("more cuts than 0 (--hmoe-max-cuts)", "--expert-model-parallel-size", "--micro-batch-size"):
        assert remedy in text
    stage_bytes = 2 * sum(plan_layer(tokens_LE[0], widths_LE[0], 1, COST).predicted.bytes)
    assert f"experts of {stage_bytes:,} bytes do not fit under the caps of 2 ranks, 2,000 bytes in all" in text


@pytest.mark.parametrize("seed", range(10))
def test_an_old_plan_is_kept_where_the_loads_did_not_change(seed):
    tokens_LE, widths_LE = random_model(seed, layers=5)
    old = plan_model(tokens_LE, widths_LE, 4, COST, cut_multiple=8)
    assert plan_model(tokens_LE, widths_LE, 4, COST, cut_multiple=8, old=old) == old
    changed = [[m * random.Random(seed).uniform(0.5, 2) for m in tokens] for tokens in tokens_LE[:1]] + tokens_LE[1:]
    new = plan_model(changed, widths_LE, 4, COST, cut_multiple=8, old=old)
    assert new.layers[1:] == old.layers[1:]
    alone = plan_layer(changed[0], widths_LE[0], 4, COST, None, 8)
    assert sorted(new.layers[0].predicted.time) == sorted(alone.predicted.time)


def test_equal_experts_stay_as_megatron_has_them_in_every_layer():
    widths_LE = [[128] * 8] * 4
    planned, in_order = plan_model(None, widths_LE, nodes_of(2, 2), COST), contiguous_plan(widths_LE, 4, None, COST)
    assert [layer.pieces for layer in planned.layers] == [layer.pieces for layer in in_order.layers]


def test_whole_model_on_many_nodes():
    """Layers of 256 experts on 64 ranks of 8 nodes: every layer within EQUAL_TIME of its bound."""
    rng = np.random.default_rng(0)
    widths_LE = [rng.permutation(np.repeat([9, 11, 13, 15, 17, 19, 21, 23], 32) * 96).tolist() for _ in range(8)]
    plan = plan_model(rng.lognormal(8, 0.6, (8, 256)), widths_LE, nodes_of(8, 8), COST)
    assert max(layer.predicted.gap for layer in plan.layers) <= EQUAL_TIME * (1 + 1e-6)
    fullest = held_bytes(plan)
    assert fullest.max() <= 1.02 * fullest.mean()


def test_stages_must_match():
    with pytest.raises(ValueError, match="2 pipeline stages for 1 layers"):
        plan_model(None, [[4]], 1, stages=[0, 1])


def test_no_room_at_all_is_said_and_numpys_numbers_are_numbers():
    with pytest.raises(InfeasiblePlan, match="layers 0-0|layers 0: "):
        plan_model([[7]], [[6]], [Rank(bytes=0)] * 2, COST)
    with pytest.raises(InfeasiblePlan):
        plan_model([[7]] * 2, [[6]] * 2, [Rank(bytes=0)] * 2, COST)
    plan = plan_layer([1, 9], [10, 20], 3, None, np.int64(2), np.int64(4))
    assert plan == plan_layer([1, 9], [10, 20], 3, None, 2, 4)
    for stages in (["0"], [0.5], [-1], [True]):
        with pytest.raises(ValueError, match=r"stages\[0\]"):
            plan_model(None, [[6]], 2, stages=stages)
    with pytest.raises(ValueError, match="cut_multiple .* at most"):
        plan_layer([1], [10], 2, cut_multiple=2**63)


@pytest.mark.parametrize("max_cuts", [None, 0])
@pytest.mark.parametrize("seed", [0, 1, *rarely(*range(2, 12))])
def test_caps_that_contiguous_placement_of_all_layers_keeps_are_kept(seed, max_cuts):
    """Also where they leave no byte free."""
    tokens_LE, widths_LE = random_model(seed, layers=4)
    in_order = contiguous_plan(widths_LE, 5, tokens_LE, COST)
    for slack in (1.0, 1.03):
        ranks = [Rank(bytes=int(held * slack)) for held in held_bytes(in_order)]
        plan = plan_model(tokens_LE, widths_LE, ranks, COST, max_cuts)
        assert plan.missing_bytes() == {}


def test_layers_that_fit_only_together():
    """Each layer is one large expert and small ones: no share of the caps by layer holds what all of them do."""
    widths_LE, tokens_LE = [[900, 10], [900, 10], [500, 400, 10]], [[1.0, 1.0], [1.0, 1.0], [1.0] * 3]
    of = {F: plan_layer([1.0], [F], 1, COST).predicted.bytes[0] for F in (10, 400, 500, 900)}
    ranks = [Rank(bytes=max(of[900] + of[10], of[500] + of[400] + of[10]))] * 3
    with pytest.raises(InfeasiblePlan):  # a third of the caps is less than the large expert
        plan_layer(tokens_LE[0], widths_LE[0], [Rank(bytes=ranks[0].bytes // 3)] * 3, COST, max_cuts=0)
    plan = plan_model(tokens_LE, widths_LE, ranks, COST, max_cuts=0)
    assert plan.missing_bytes() == {}
    assert [validate_pieces(layer.pieces, layer.widths) for layer in plan.layers] == [[]] * 3


def test_time_and_bound_are_those_of_the_slowest_stage():
    plan = contiguous_plan([[10, 30], [20, 20], [5, 5]], 2, stages=(0, 1, 1))
    assert plan.time == 18 * 30 and plan.bound == 18 * 25
    assert contiguous_plan([[10, 30], [20, 20], [5, 5]], 2).time == 18 * (30 + 20 + 5)


def test_a_plan_under_other_loads():
    old = contiguous_plan([[10, 30]], 2, [[1.0, 1.0]])
    new = plan_model([[6.0, 1.0]], [[10, 30]], nodes_of(2, 1), COST)
    moved = under(old, new)
    assert moved.layers[0].pieces == old.layers[0].pieces and moved.layers[0].tokens == (6.0, 1.0)
    assert moved.cost == COST and moved.rank_specs == nodes_of(2, 1)
    assert moved.time == 18 * 64 * 60 and moved.bound == pytest.approx(18 * 64 * 45)
