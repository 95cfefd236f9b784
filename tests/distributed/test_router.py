"""The router with its losses attached: values and gradients against float64, with padding, on one rank and two."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from hmoe_megatron.config import HMoEConfig
from tests.distributed.ranks import run_ranks

WIDTHS, TOKENS, BATCH = (8, 24, 16, 48), 6, 4
# fp32 router of 24 tokens against float64.
BOUND = 3e-6
Z_LOSS_COEFF = 0.2
COEFFS = {"p_penalty_coeff": 0.7, "load_balance_coeff": 0.3}
SETTINGS = {
    "topk": HMoEConfig(**COEFFS),
    "topp": HMoEConfig(router="topp", top_p=0.6, router_entropy_coeff=0.4, **COEFFS),
    "topp, at most 2": HMoEConfig(router="topp", top_p=0.9, max_experts_per_token=2, **COEFFS),
}
ROUTINGS = ("spread", "one expert with no token", "all tokens on one expert")


def draw(routing):
    """Logits [TOKENS, BATCH, E], directions of the same shape, padding mask [TOKENS, BATCH]."""
    rng = np.random.default_rng(2)
    logits, direction = rng.normal(size=(2, TOKENS, BATCH, len(WIDTHS)))
    if routing == "one expert with no token":
        logits[..., 1] -= 20
    if routing == "all tokens on one expert":
        logits[..., 2] += 20
    mask = np.zeros((TOKENS, BATCH), bool)
    mask[4:, 1] = mask[3:, 2] = True
    return logits, direction, mask


def route(settings, routing, padding):
    """(weights, routing map, gradient of the logits, counts, tokens) of this rank's share of the tokens."""
    from megatron.core import parallel_state
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
    from megatron.core.transformer.transformer_config import TransformerConfig

    from hmoe_megatron.moe.router import HMoERouter
    from hmoe_megatron.telemetry.counters import RoutingStats

    world, rank = torch.distributed.get_world_size(), torch.distributed.get_rank()
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=world)
    config = TransformerConfig(
        num_layers=1,
        hidden_size=8,
        num_attention_heads=2,
        num_moe_experts=len(WIDTHS),
        moe_router_topk=2,
        moe_ffn_hidden_size=8,
        tensor_model_parallel_size=world,
        sequence_parallel=world > 1,
        add_bias_linear=False,
        moe_router_load_balancing_type="none",
        moe_z_loss_coeff=None if padding else Z_LOSS_COEFF,
    )
    stats = RoutingStats([0], len(WIDTHS))
    layout = SimpleNamespace(settings=settings, stats=stats, widths={0: WIDTHS})
    router = HMoERouter(config, ProcessGroupCollection.use_mpu_process_groups(), layout=layout, layer=0)
    router.set_layer_number(1)
    MoEAuxLossAutoScaler.set_loss_scale(torch.tensor(1.0))
    share = slice(rank * TOKENS // world, (rank + 1) * TOKENS // world)
    logits, direction, mask = (values[share] for values in draw(routing))
    leaf = torch.tensor(logits, dtype=torch.float32, requires_grad=True)
    weights, routing_map = router.routing(leaf, torch.tensor(mask) if padding else None)
    (weights * torch.tensor(direction).view_as(weights)).sum().backward()
    groups = [parallel_state.get_tensor_and_data_parallel_group(with_context_parallel=True)]
    counts, tokens, _ = stats.take(groups, torch.device("cpu"))
    return weights.detach().numpy(), routing_map.numpy(), leaf.grad.numpy(), counts.numpy()[0], tokens.numpy()[0]


def plain(settings, routing, padding, chosen):
    """Float64, autograd through the formulas as the paper writes them; ``chosen`` [T, E] is the routing to assume."""
    logits, direction, mask = draw(routing)
    leaf = torch.tensor(logits, dtype=torch.float64, requires_grad=True)
    probs = torch.softmax(leaf.view(-1, len(WIDTHS)), -1)
    chosen = torch.tensor(chosen)
    weights = probs * chosen
    weights = weights / weights.sum(-1, keepdim=True)
    valid = torch.tensor(~mask.reshape(-1) if padding else np.ones(mask.size, bool))
    p, c, n, t = probs[valid], chosen[valid].double(), len(WIDTHS), int(valid.sum())
    h = torch.tensor(WIDTHS, dtype=torch.float64) / np.mean(WIDTHS)
    loss = settings.p_penalty_coeff * n * sum((c[:, i] * h[i]).sum() / t * p[:, i].sum() / t for i in range(n))
    loss = loss + settings.load_balance_coeff * n * sum(c[:, i].sum() / t * p[:, i].sum() / t for i in range(n))
    loss = loss + settings.entropy_coeff * -(p * p.log()).sum() / t
    if not padding:  # with it Megatron's own takes the mean of the ranks' means
        loss = loss + Z_LOSS_COEFF * leaf.view(-1, n).logsumexp(-1).square().mean()
    ((weights * torch.tensor(direction).view_as(weights)).sum() + loss).backward()
    return weights.detach().numpy(), leaf.grad.numpy(), c.sum(0).numpy(), t


def expected_choice(settings, routing):
    logits = draw(routing)[0].reshape(-1, len(WIDTHS))
    probs = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    chosen = np.zeros(probs.shape, bool)
    for token, row in enumerate(probs):
        order, total = np.argsort(-row, kind="stable"), 0.0
        for rank, expert in enumerate(order):
            stop = rank == 2 if settings.router == "topk" else total >= settings.top_p
            if stop or rank == (settings.max_experts_per_token or len(WIDTHS)):
                break
            chosen[token, expert] = True
            total += row[expert]
    return chosen


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("padding", [False, True])
@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("router", SETTINGS)
def test_weights_losses_and_gradients(router, routing, padding, world):
    settings = SETTINGS[router]
    ranks = run_ranks(world, route, settings, routing, padding)
    weights, routing_map, gradient = (np.concatenate([rank[i] for rank in ranks]) for i in range(3))
    np.testing.assert_array_equal(routing_map, expected_choice(settings, routing))
    expected_weights, expected_gradient, counts, tokens = plain(settings, routing, padding, routing_map)
    np.testing.assert_allclose(weights, expected_weights, atol=BOUND)
    np.testing.assert_allclose(gradient, expected_gradient, atol=BOUND)
    assert ranks[0][3].tolist() == counts.tolist() and ranks[0][4] == tokens
