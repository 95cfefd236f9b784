"""Losses and Top-P against plain float64 re-computation, value and gradient."""

import math

import numpy as np
import pytest
import torch

from hmoe_megatron.moe.losses import load_balance, p_penalty, router_entropy
from hmoe_megatron.moe.router import top_p_routing

WIDTHS = np.array([9.0, 13.0, 17.0, 23.0])
# fp32 sums over 4 experts and 12 tokens, compared with float64.
BOUND = 2e-6
MAPS = {
    "spread": lambda t, e: np.isin(np.arange(e), [t % e, (t + 1) % e]),
    "one expert with no token": lambda t, e: np.isin(np.arange(e), [t % (e - 1)]),
    "all tokens on one expert": lambda t, e: np.arange(e) == 2,
    "all experts": lambda t, e: np.ones(e, bool),
}


def routing(kind, tokens=12):
    rng = np.random.default_rng(5)
    logits = rng.normal(size=(tokens, 4)) * 2
    return logits, np.array([MAPS[kind](t, 4) for t in range(tokens)])


def softmax(logits):
    exp = np.exp(logits - logits.max(1, keepdims=True))
    return exp / exp.sum(1, keepdims=True)


def numeric_gradient(loss, logits, step=1e-5):
    gradient = np.zeros_like(logits)
    for index in np.ndindex(*logits.shape):
        up, down = logits.copy(), logits.copy()
        up[index] += step
        down[index] -= step
        gradient[index] = (loss(up) - loss(down)) / (2 * step)
    return gradient


@pytest.mark.parametrize("padding", [0, 5])
@pytest.mark.parametrize("kind", MAPS)
def test_p_penalty_and_entropy_against_float64(kind, padding):
    logits, chosen = routing(kind)
    valid = np.arange(12) < 12 - padding
    h = WIDTHS / WIDTHS.mean()

    def plain_penalty(z):
        total = 0.0
        for i in range(4):
            m = sum(h[i] for t in range(12) if valid[t] and chosen[t, i]) / valid.sum()
            phat = sum(softmax(z)[t, i] for t in range(12) if valid[t]) / valid.sum()
            total += m * phat
        return 4 * total

    def plain_entropy(z):
        p = softmax(z)[valid]
        return float(np.mean([-sum(x * math.log(x) for x in row) for row in p]))

    leaf = torch.tensor(logits, dtype=torch.float32, requires_grad=True)
    log_probs = torch.log_softmax(leaf, -1)
    mask = torch.tensor(valid)
    counts = torch.tensor(chosen & valid[:, None]).sum(0)
    prob_sum = (log_probs.exp() * mask.unsqueeze(-1)).sum(0)
    for loss, plain in (
        (p_penalty(counts, prob_sum, torch.tensor(h, dtype=torch.float32), mask.sum()), plain_penalty),
        (router_entropy(log_probs, mask, mask.sum()), plain_entropy),
    ):
        assert loss.item() == pytest.approx(plain(logits), rel=BOUND)
        (gradient,) = torch.autograd.grad(loss, leaf, retain_graph=True)
        np.testing.assert_allclose(gradient.numpy(), numeric_gradient(plain, logits), atol=2 * BOUND)


@pytest.mark.parametrize("kind", MAPS)
def test_load_balance_is_n_times_the_sum_of_shares_times_probabilities(kind):
    """Which P-Penalty at equal widths is too, whatever that width."""
    logits, chosen = routing(kind)
    probs = softmax(logits)
    expected = 4 * sum(chosen[:, i].mean() * probs[:, i].mean() for i in range(4))
    counts, prob_sum = torch.tensor(chosen).sum(0), torch.tensor(probs, dtype=torch.float32).sum(0)
    assert load_balance(counts, prob_sum, 12).item() == pytest.approx(expected, rel=BOUND)
    equal = torch.full((4,), 17.0)
    assert p_penalty(counts, prob_sum, equal / equal.mean(), 12).item() == pytest.approx(expected, rel=BOUND)


def test_load_balance_at_perfect_balance_is_the_number_of_experts_a_token():
    counts, prob_sum = torch.full((4,), 6), torch.full((4,), 3.0)  # 12 tokens, K = 2, uniform probabilities
    assert load_balance(counts, prob_sum, 12).item() == pytest.approx(2.0)


def test_load_balance_is_k_times_megatrons():
    from megatron.core.transformer.moe.moe_utils import switch_load_balancing_loss_func

    logits, chosen = routing("spread")
    probs = torch.softmax(torch.tensor(logits, dtype=torch.float32), -1)
    counts = torch.tensor(chosen).sum(0)
    stock = switch_load_balancing_loss_func(probs, counts, 12, topk=2, num_experts=4, moe_aux_loss_coeff=1.0)
    assert load_balance(counts, probs.sum(0), 12).item() == pytest.approx(2 * stock.item(), rel=BOUND)


def test_entropy_falls_as_routing_sharpens():
    """Its minimisation must sharpen the routing; equation 5 of the paper, as printed, would do the opposite."""
    flat, sharp = torch.log_softmax(torch.tensor([[0.0, 0, 0, 0], [4.0, 0, 0, 0]]), -1).split(1)
    assert router_entropy(flat, None, 1).item() == pytest.approx(math.log(4))
    assert router_entropy(sharp, None, 1) < router_entropy(flat, None, 1)


def plain_top_p(probs, top_p, max_experts):
    weights, chosen = np.zeros_like(probs), np.zeros_like(probs, bool)
    for t, row in enumerate(probs):
        total = 0.0
        for rank, e in enumerate(sorted(range(len(row)), key=lambda e: (-row[e], e))):
            if rank and (total >= top_p or (max_experts and rank >= max_experts)):
                break
            chosen[t, e] = True
            total += row[e]
        weights[t, chosen[t]] = row[chosen[t]] / row[chosen[t]].sum()
    return weights, chosen


@pytest.mark.parametrize("max_experts", [None, 1, 3])
@pytest.mark.parametrize("top_p", [0.01, 0.3, 0.6, 0.95, 1.0])
def test_top_p_against_a_plain_loop(top_p, max_experts):
    rng = np.random.default_rng(11)
    logits = torch.tensor(rng.normal(size=(64, 8)) * 2, dtype=torch.float32, requires_grad=True)
    probs = torch.softmax(logits, -1)
    weights, chosen = top_p_routing(probs, top_p, max_experts)
    expected_weights, expected_chosen = plain_top_p(probs.detach().double().numpy(), top_p, max_experts)
    np.testing.assert_array_equal(chosen.numpy(), expected_chosen)
    np.testing.assert_allclose(weights.detach().numpy(), expected_weights, atol=BOUND)

    direction = torch.tensor(rng.normal(size=(64, 8)))
    (gradient,) = torch.autograd.grad((weights * direction).sum(), logits)
    leaf = logits.detach().double().requires_grad_()
    p = torch.softmax(leaf, -1) * chosen
    (expected,) = torch.autograd.grad(((p / p.sum(-1, keepdim=True)) * direction).sum(), leaf)
    np.testing.assert_allclose(gradient.numpy(), expected.numpy(), atol=10 * BOUND)


def test_top_p_prefers_the_lower_of_equal_experts_and_keeps_one():
    weights, chosen = top_p_routing(torch.full((1, 4), 0.25), 0.5)
    assert chosen.tolist() == [[True, True, False, False]] and weights.sum().item() == 1
    _, chosen = top_p_routing(torch.full((1, 4), float("nan")), 0.5)
    assert chosen.sum() == 1
