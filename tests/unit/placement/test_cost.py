"""The cost model: FLOPs, time, travel and bytes against counts made by hand, and what the planner relies on."""

import json
import random

import numpy as np
import pytest

from hmoe_megatron.placement import CostModel, Piece, Profile, Rank, nodes_of
from hmoe_megatron.placement.cost import expert_params, forward_flops, piece_times, predict, training_flops
from hmoe_megatron.placement.profiles import PROFILES

H = 64
ALONE = [Rank()]
# Everything costs, with a width tile and a row tile; fp32, as on a CPU.
FULL = Profile(
    "made up",
    1e9,
    launch_s=2e-5,
    memory_bytes_per_s=1e7,
    row_tile=16,
    width_tile=8,
    element_bytes=4,
    intra_node_bytes_per_s=1e7,
    inter_node_bytes_per_s=2e6,
    activation_bytes_per_s=3e8,
)
COSTS = {name: CostModel(profile, H) for name, profile in (PROFILES | {"full": FULL}).items()}
every_profile = pytest.mark.parametrize("cost", COSTS.values(), ids=COSTS)


def time(cost, tokens, width, ranks=ALONE, rank=0):
    """Of one piece on ranks[rank]."""
    pieces = [[Piece(0, 0, width)] if r == rank else [] for r in range(len(ranks))]
    return piece_times(pieces, [tokens], cost, ranks)[rank][0]


@pytest.mark.parametrize("tokens, width, hidden_size", [(1, 1, 1), (7, 96, 32), (0, 96, 32), (4096, 2208, 768)])
def test_flops_and_params(tokens, width, hidden_size):
    gate_or_up = 2 * tokens * hidden_size * width
    down = 2 * tokens * width * hidden_size
    assert forward_flops(tokens, width, hidden_size) == 2 * gate_or_up + down
    assert training_flops(tokens, width, hidden_size) == 3 * forward_flops(tokens, width, hidden_size)
    assert expert_params(width, hidden_size) == 2 * hidden_size * width + width * hidden_size
    assert time(CostModel(hidden_size=hidden_size), tokens, width) == training_flops(tokens, width, hidden_size)


def test_the_papers_expert_parameters():
    """12 layers of total width 12,288 at hidden 768: 340 M of the 417 M of HMoE-0.4B."""
    assert 12 * expert_params(12_288, 768) == 339_738_624


@every_profile
@pytest.mark.parametrize("tokens", [0.5, 3, 100, 5000])
def test_time_is_affine_in_the_padded_width(cost, tokens):
    tile = cost.width_tile
    times = [time(cost, tokens, tiles * tile) for tiles in (1, 2, 3, 50)]
    assert times[1] > times[0] > 0
    step = times[1] - times[0]
    assert times[2] == pytest.approx(times[0] + 2 * step) and times[3] == pytest.approx(times[0] + 49 * step)
    assert {time(cost, tokens, width) for width in range(tile + 1, 2 * tile + 1)} == {times[1]}


@every_profile
def test_time_never_falls_with_tokens_or_width(cost):
    rng = random.Random(0)
    for _ in range(300):
        tokens, width = rng.choice([0, rng.random(), rng.lognormvariate(4, 3)]), rng.randint(1, 5000)
        ranks = nodes_of(2, 2)
        here = time(cost, tokens, width, ranks)
        assert here <= time(cost, tokens + rng.lognormvariate(0, 3), width, ranks)
        assert here <= time(cost, tokens, width + rng.randint(1, 500), ranks)


@every_profile
def test_no_tokens_take_no_time(cost):
    per_piece, per_width = cost.compute([0, 5])
    assert per_piece[0] == per_width[0] == time(cost, 0, 96, nodes_of(2, 2)) == 0 < per_width[1]


@every_profile
def test_a_cut_saves_no_work(cost):
    """It costs its fixed time and its travel once more, where it falls on a tile."""
    ranks, tile, tokens = nodes_of(2, 2), cost.width_tile, 100
    whole, parts = time(cost, tokens, 5 * tile, ranks), [time(cost, tokens, n * tile, ranks) for n in (2, 3)]
    again = cost.compute([tokens])[0][0] + tokens * cost.travel(ranks)[0]
    assert sum(parts) == pytest.approx(whole + again)
    assert again == 0 if cost.unit == "FLOPs" else again > 0


@pytest.mark.parametrize("m", [3, 100, 400, 1000])
def test_each_term_of_the_time(m):
    w, b = 80, 4
    rows = m + 15 / 2  # half a tile of 16 is lost
    products = 6 * rows * w * H / 1e9
    weights = 3 * w * H / 1e7
    passes = max(products, b * weights), max(products, b * weights), max(products, 8 * weights)
    activations = (4 * m * H * b + 8 * m * w * b) / 3e8
    expected = 2e-5 + sum(passes) + activations
    assert time(COSTS["full"], m, w) == time(COSTS["full"], m, w - 7) == pytest.approx(expected)


def test_reading_weights_is_the_floor_at_few_rows():
    flops, memory = 1e12, 1e10
    cost = CostModel(Profile("bf16", flops, memory_bytes_per_s=memory), H)
    floor = 3 * H * (2 + 2 + 8) / memory  # weights read forward and backward, an fp32 gradient read and written
    few, many = cost.compute([1e-9, 1, 10, 90])[1], cost.compute([401, 1000])[1]
    assert few == pytest.approx(floor)
    assert many == pytest.approx(18 * np.array([401, 1000]) * H / flops)
    # Weights are read in the time of flops / memory rows and bytes; the gradient takes four times the rows.
    between = cost.compute([200])[1][0]
    assert between == pytest.approx(2 * 6 * 200 * H / flops + 3 * H * 8 / memory)


def test_a_slow_rank_computes_slowly_and_receives_as_fast():
    ranks = [Rank(), Rank(speed=0.5)]
    compute, travel = time(COSTS["full"], 40, 64), 40 * COSTS["full"].travel(ranks)[0]
    assert time(COSTS["full"], 40, 64, ranks, 0) == pytest.approx(compute + travel)
    assert time(COSTS["full"], 40, 64, ranks, 1) == pytest.approx(2 * compute + travel)


ROW_BYTES = 4 * H * 4  # there and back, forward and backward, in fp32
INSIDE_S, ACROSS_S = ROW_BYTES / 1e7, ROW_BYTES / 2e6


@pytest.mark.parametrize(
    "ranks, expected",
    [
        (nodes_of(1, 1), [0]),
        (nodes_of(1, 4), [3 * INSIDE_S / 4] * 4),
        (nodes_of(4, 1), [3 * ACROSS_S / 4] * 4),
        (nodes_of(4, 2), [(INSIDE_S + 6 * ACROSS_S) / 8] * 8),
        ([Rank(7), Rank(3), Rank(7)], [(INSIDE_S + ACROSS_S) / 3, 2 * ACROSS_S / 3, (INSIDE_S + ACROSS_S) / 3]),
    ],
    ids=["alone", "one node", "nodes of one", "four nodes", "unequal nodes"],
)
def test_travel_by_link(ranks, expected):
    assert COSTS["full"].travel(ranks) == pytest.approx(expected)


def test_travel_over_links_that_are_not_known():
    one_rate = CostModel(Profile("measured on one node", 1e9, intra_node_bytes_per_s=1e7, element_bytes=4), H)
    assert one_rate.travel(nodes_of(2, 2)) == pytest.approx([3 * INSIDE_S / 4] * 4)
    assert COSTS["flops"].travel(nodes_of(2, 2)).tolist() == [0] * 4


@pytest.mark.parametrize(
    "element_bytes, copies, param_bytes",
    [
        (2, 1, 2 + 4 + 4 + 4 + 4),  # weight, gradient, two moments, main weight
        (2, 4, 2 + 4 + 3),
        (2, 64, 6 + 12 / 64),
        (4, 1, 4 + 4 + 4 + 4),
        (4, 4, 4 + 4 + 2),
    ],
)
def test_bytes(element_bytes, copies, param_bytes):
    cost = CostModel(Profile("made up", 1e9, element_bytes=element_bytes), H, copies, live_micro_batches=3)
    tokens, width = [0, 10, 0.1], 96
    piece_bytes, width_bytes = cost.memory(tokens)
    total = piece_bytes + width_bytes * width
    exact = [3 * width * H * param_bytes + 3 * m * element_bytes * (2 * H + 3 * width) for m in tokens]
    assert np.all(total >= exact) and np.all(total - exact < width + 1), "rounded up, by less than a byte a width unit"
    assert total[:2].tolist() == exact[:2]
    assert np.all(piece_bytes % 1 == 0) and np.all(width_bytes % 1 == 0)


def test_full_recompute_holds_no_activations():
    cost = CostModel(FULL, H, live_micro_batches=0)
    assert cost.memory([1000])[0] == 0 and cost.memory([1000])[1] == cost.memory([0])[1]


def test_prediction_adds_up_by_rank():
    pieces, tokens, ranks = ((Piece(0, 0, 16), Piece(1, 8, 96)), (), (Piece(1, 0, 8),)), (7.0, 3.0), nodes_of(3, 1)
    found = predict(pieces, tokens, COSTS["full"], ranks, bound=1e-3)
    by_piece = piece_times(pieces, tokens, COSTS["full"], ranks)
    assert found.time == pytest.approx([sum(times) for times in by_piece]) and list(map(len, by_piece)) == [2, 0, 1]
    assert found.tokens == (10, 0, 3)
    assert found.params == (3 * H * (16 + 88), 0, 3 * H * 8)
    assert found.flops == (18 * H * (7 * 16 + 3 * 88), 0, 18 * H * 3 * 8)
    assert found.bytes[1] == 0 and found.bytes[2] == 3 * 4 * (2 * H + 3 * 8) + 16 * 3 * H * 8
    assert found.gap == pytest.approx(max(found.time) / 1e-3 - 1)


@every_profile
def test_json_and_back(cost):
    cost = CostModel(cost.profile, 768, 3, 1.5)
    again = CostModel.from_dict(json.loads(json.dumps(cost.to_dict())))
    assert again == cost and again.profile.sources == cost.profile.sources
    numpy_made = CostModel(cost.profile, np.int64(768), np.int32(3), np.float32(1.5))
    assert json.dumps(numpy_made.to_dict()) == json.dumps(cost.to_dict())


def test_errors_list_all_problems():
    with pytest.raises(ValueError) as error:
        CostModel("h100", 0, 2.5, float("nan"))
    for part in ("profile is not", "hidden_size 0 ", "expert_data_parallel_size 2.5", "live_micro_batches nan"):
        assert part in str(error.value)
    body = CostModel(FULL, H).to_dict()
    del body["profile"], body["hidden_size"]
    with pytest.raises(ValueError, match="unknown field 'speed'; field 'profile' is missing; field 'hidden_size' is"):
        CostModel.from_dict(body | {"speed": 1})
    with pytest.raises(ValueError, match="not a JSON object"):
        CostModel.from_dict([1])
