"""Tokens that experts of different width take at most."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from megatron.core.transformer.moe.moe_utils import apply_router_token_dropping

from hmoe_megatron.moe.capacity import capacities, within_capacity


def routed(seed, tokens, experts, k):
    logits_TE = torch.randn(tokens, experts, generator=torch.Generator().manual_seed(seed))
    weights_TK, expert_TK = logits_TE.softmax(dim=-1).topk(k)
    weights_TE = torch.zeros_like(logits_TE).scatter(1, expert_TK, weights_TK)
    return weights_TE, torch.zeros_like(logits_TE, dtype=torch.bool).scatter(1, expert_TK, True)


def test_every_expert_may_compute_the_same():
    widths_E = torch.tensor([16, 32, 64, 128])
    capacity_E = capacities(widths_E, 4096, 1.25)
    assert (capacity_E * widths_E).tolist() == [1.25 * 1024 * 60] * 4


@given(st.integers(0, 99), st.integers(1, 40), st.integers(2, 9), st.data())
def test_equal_widths_are_dropped_as_megatron_does(seed, tokens, experts, data):
    k = data.draw(st.integers(1, experts))
    factor = data.draw(st.floats(0.05, 3.0))
    weights_TE, routing_map_TE = routed(seed, tokens, experts, k)
    capacity_E = capacities(torch.full((experts,), 24), tokens * k, factor)
    kept_TE = within_capacity(weights_TE, routing_map_TE, capacity_E, "probs")
    expected_TE, expected_map_TE = apply_router_token_dropping(weights_TE, routing_map_TE, k, factor)
    assert torch.equal(kept_TE, expected_map_TE) and torch.equal(weights_TE * kept_TE, expected_TE)


@pytest.mark.parametrize("policy", ["probs", "position"])
def test_what_is_kept_is_full_and_the_first_of_its_order(policy):
    weights_TE, routing_map_TE = routed(3, 200, 4, 2)
    capacity_E = torch.tensor([200, 7, 40, 0])
    kept_TE = within_capacity(weights_TE, routing_map_TE, capacity_E, policy)
    assert kept_TE.sum(dim=0).tolist() == torch.minimum(routing_map_TE.sum(dim=0), capacity_E).tolist()
    assert not (kept_TE & ~routing_map_TE).any()
    order_TE = weights_TE if policy == "probs" else -torch.arange(200.0).unsqueeze(1).expand(200, 4)
    for kept_T, chosen_T, order_T in zip(kept_TE.t(), routing_map_TE.t(), order_TE.t(), strict=True):
        dropped_T = chosen_T & ~kept_T
        if kept_T.any() and dropped_T.any():
            assert order_T[kept_T].min() > order_T[dropped_T].max()


def test_among_equal_weights_the_first_tokens_are_kept():
    weights_TE = torch.full((6, 2), 0.5)
    kept_TE = within_capacity(weights_TE, weights_TE > 0, torch.tensor([2, 4]), "probs")
    assert kept_TE.t().tolist() == [[True] * 2 + [False] * 4, [True] * 4 + [False] * 2]
