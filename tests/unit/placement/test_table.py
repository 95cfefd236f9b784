"""The table: what it shows, how it folds, and that it fits."""

import pytest

from hmoe_megatron.placement import (
    CostModel,
    PlacementPlan,
    Profile,
    contiguous_plan,
    plan_layer,
    plan_model,
    plan_table,
)
from hmoe_megatron.widths import expert_widths, layer_widths

MAIN = "arithmetic:9:23"


def test_rows_shares_and_last_line():
    plan = plan_model(None, layer_widths(MAIN, 3, 8, 12_288), 8, cut_multiple=16)
    title, head, *rows, last = plan_table(plan).splitlines()
    assert title == "layers 0-2: 8 experts on 8 ranks"
    assert head.split() == ["rank", "pieces", "FLOPs", "%", "params", "%", "tokens", "%"]
    assert rows[0].split() == ["0", "0", "7[0:672)", "12.50", "12.50", "16.67"] and len(rows) == 8
    for column in (-1, -2, -3):
        assert sum(float(row.split()[column]) for row in rows) == pytest.approx(100, abs=0.05)
    assert last == ("max over mean of FLOPs 1.0000, 4 cuts; bound on the slowest rank 1.0000 of the mean, gap 0.00%")


def test_layers_of_one_plan_fold_and_one_can_be_picked():
    plan = contiguous_plan(layer_widths(f"0-3={MAIN};4=equal;5={MAIN}", 6, 8, 2048), 2)
    table = plan_table(plan)
    assert [line for line in table.splitlines() if line.startswith("layer")] == [
        "layers 0-3: 8 experts on 2 ranks",
        "layer 4: 8 experts on 2 ranks",
        "layer 5: 8 experts on 2 ranks",
    ]
    assert plan_table(plan, 4) in table and plan_table(plan, 4).count("layer") == 1
    assert plan_table(plan, 2).splitlines()[1:] == plan_table(PlacementPlan(plan.layers[:1])).splitlines()[1:]
    assert "max over mean of FLOPs 1.2500, 0 cuts" in plan_table(plan, 0)
    assert "gap 25.00%" in plan_table(plan, 0) and "gap 0.00%" in plan_table(plan, 4)
    for layer in (-1, 6):
        with pytest.raises(ValueError, match="layers 0-5"):
            plan_table(plan, layer)


def test_the_plan_of_one_layer_is_a_table_too():
    layer = plan_layer([100, 50, 25], (8, 16, 32), 2)
    assert plan_table(layer) == plan_table(PlacementPlan((layer,))) and "3 experts on 2 ranks" in plan_table(layer)


@pytest.mark.parametrize("E, ranks", [(1, 1), (2, 5), (8, 16), (64, 17), (4096, 2), (512, 1024)])
def test_it_fits(E, ranks):
    widths = expert_widths(MAIN, E, 2000 * E)
    for tokens in ([0] * E, [1000 / (e + 1) for e in range(E)]):
        for plan in (contiguous_plan([widths], ranks, [tokens]), plan_model([tokens], [widths], min(ranks, 64))):
            lines = plan_table(plan).splitlines()
            assert max(map(len, lines)) <= 100 and len(lines) <= 20


def test_the_middle_of_many_ranks_is_left_out():
    lines = plan_table(contiguous_plan([[8] * 20], 20)).splitlines()
    assert [line.split()[0] for line in lines[2:-1]] == [*map(str, range(8)), "...", *map(str, range(12, 20))]
    assert "(4 ranks more)" in lines[10]
    assert len(plan_table(contiguous_plan([[8] * 16], 16)).splitlines()) == 19


def test_pieces_without_room_are_counted():
    row = plan_table(contiguous_plan([[8] * 100], 1)).splitlines()[2]
    shown = row.split(" +")[0].split()[1:]
    assert shown == [str(e) for e in range(len(shown))] and f"+{100 - len(shown)} more" in row


def test_layers_whose_ranks_are_renamed_fold():
    """Bytes are evened out over layers by renaming ranks: the same plan in another order."""
    plan = plan_model([[1.0] * 4] * 3, [[10, 20, 30, 80]] * 3, 4, max_cuts=0)
    assert len({layer.pieces for layer in plan.layers}) > 1
    assert [line for line in plan_table(plan).splitlines() if line.startswith("layer")] == [
        "layers 0-2, ranks in another order in each: 4 experts on 4 ranks"
    ]


def test_many_different_layers_are_a_line_each():
    loads = [[1.0 + layer, 1.0, 2.0, 3.0] for layer in range(6)]
    text = plan_table(contiguous_plan([[10, 20, 30, 80]] * 6, 2, loads))
    assert [line.split(":")[0] for line in text.splitlines() if line.startswith("layer")] == [
        f"layer {layer}" for layer in range(6)
    ]
    assert text.count("rank  pieces") == 3
    # 6 x 10 + 1 x 20 = 80 on one rank, 2 x 30 + 3 x 80 = 300 on the other: 300 / 190.
    assert "layer 5: max/mean 1.5789, 0 cuts, gap 57.89%" in text.splitlines()[-1]


def test_with_a_profile_time_and_bytes_are_shown():
    cost = CostModel(Profile("test", flops_per_s=1e9), hidden_size=64)
    head, *rows = plan_table(contiguous_plan([[100, 300]], 2, [[10.0, 10.0]], cost)).splitlines()[1:4]
    assert head.split() == ["rank", "pieces", "us", "FLOPs", "%", "tokens", "%", "MiB"]
    shown_us = [float(row.split()[2].replace(",", "")) for row in rows]
    assert shown_us == [18 * 10 * 100 * 64 / 1e9 * 1e6, 18 * 10 * 300 * 64 / 1e9 * 1e6]
