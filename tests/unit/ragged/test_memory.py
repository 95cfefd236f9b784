"""Memory of a layer's forward and backward pass: what is kept between them, and the most that is there at a time."""

import gc

import pytest
import torch

from hmoe_megatron.moe.compute import ragged
from hmoe_megatron.moe.compute.ragged.self_test import Case, drawn
from tests.live_bytes import LiveBytes
from tests.rows import rarely
from tests.unit.ragged import cases

pytestmark = cases.INTERPRETED
WIDTH, PIECES, ROWS, HIDDEN = 64, 4, 48, 32
EQUAL = Case(HIDDEN, (WIDTH,) * PIECES, (ROWS,) * PIECES)
UNEQUAL = EQUAL._replace(widths=(24, 40, 88, 104))


def pass_through(compute, case):
    """(bytes kept between forward and backward, most bytes) beside the inputs."""
    tensors, dy = drawn(case, torch.device("cpu"))
    tensors = [tensor.requires_grad_() for tensor in tensors]
    with LiveBytes([*tensors, dy], in_cycles=True) as live:  # the interpreter leaves its arguments in them
        y = compute(*tensors[:2], list(case.rows), *tensors[2:], case.widths)
        gc.collect()
        kept = live.now - y.nbytes
        y.backward(dy)
    return kept, live.most


def megatrons_grouped_mlp(x, probs, rows, fc1, fc2, widths):
    """As Megatron's TEGroupedMLP computes equal experts: two grouped products and its weighted SwiGLU between them."""
    from megatron.core.fusions.fused_bias_swiglu import WeightedSwiGLUFunction

    (width,), ends = set(widths), torch.tensor(rows).cumsum(0).to(torch.int32)
    w1, w2 = fc1.view(len(widths), 2 * width, -1), fc2.view(len(widths), -1, width)
    gate_up = torch._grouped_mm(x, w1.transpose(1, 2), offs=ends)
    hidden = WeightedSwiGLUFunction.apply(gate_up, probs.unsqueeze(-1), False)
    return torch._grouped_mm(hidden, w2.transpose(1, 2), offs=ends)


ROWS_X_WIDTHS = sum(rows * width for rows, width in zip(UNEQUAL.rows, UNEQUAL.widths, strict=True))
SCHEDULE_BYTES = 20_000  # of this batch: int64, a few numbers a tile


@pytest.mark.parametrize(("keep_hidden", "numbers"), [(False, 2), *rarely((True, 3))])
def test_what_is_kept_a_row_and_width(keep_hidden, numbers):
    kept, _ = pass_through(cases.backend(ragged, cases.tiles(64, 128, 32), keep_hidden), UNEQUAL)
    assert numbers * ROWS_X_WIDTHS * 4 <= kept <= numbers * ROWS_X_WIDTHS * 4 + SCHEDULE_BYTES


def test_the_most_is_not_more_than_megatrons_grouped_mlp_of_equal_widths():
    _, ours = pass_through(cases.backend(ragged, cases.tiles(64, 128, 32)), UNEQUAL)
    _, megatrons = pass_through(megatrons_grouped_mlp, EQUAL)
    print(f"most bytes: {ours}, Megatron's {megatrons}")
    assert ours - SCHEDULE_BYTES <= megatrons
