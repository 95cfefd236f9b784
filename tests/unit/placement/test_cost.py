"""FLOPs and parameters against counts made by hand from the three products of a SwiGLU expert."""

import pytest

from hmoe_megatron.placement.cost import FlopsCost, expert_params, forward_flops, training_flops


@pytest.mark.parametrize("tokens, width, hidden_size", [(1, 1, 1), (7, 96, 32), (0, 96, 32), (4096, 2208, 768)])
def test_counts(tokens, width, hidden_size):
    gate_or_up = 2 * tokens * hidden_size * width
    down = 2 * tokens * width * hidden_size
    assert forward_flops(tokens, width, hidden_size) == 2 * gate_or_up + down
    assert training_flops(tokens, width, hidden_size) == 3 * forward_flops(tokens, width, hidden_size)
    assert FlopsCost(hidden_size)(tokens, width) == training_flops(tokens, width, hidden_size)
    assert expert_params(width, hidden_size) == 2 * hidden_size * width + width * hidden_size


def test_the_papers_expert_parameters():
    """12 layers of total width 12,288 at hidden 768: 340 M of the 417 M of HMoE-0.4B."""
    assert 12 * expert_params(12_288, 768) == 339_738_624


def test_a_cut_saves_no_work():
    cost = FlopsCost(64)
    assert cost(10, 96) == cost(10, 32) + cost(10, 64) and cost(0, 96) == 0
