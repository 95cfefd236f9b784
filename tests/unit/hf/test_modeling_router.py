"""The exported model's router: bitwise the training router's, its losses those of hmoe_megatron/moe/losses.py."""

import pytest
import torch
from megatron.core.transformer.moe.moe_utils import router_gating_linear, topk_routing_with_score_function
from tiny_models import TOP_K, TOP_P, tiny_config, tiny_model, token_ids

from hmoe_megatron.hf.hmoe_layer import HMoERouter, route, router_loss, top_k_routing, top_p_routing
from hmoe_megatron.moe import losses, router

DTYPES = [torch.float32, torch.bfloat16]
# Sums of the same fp32 terms in another order.
LOSS_RTOL = 2e-6


def logits_with_ties(experts=8, tokens=400, dtype=torch.float32):
    """Half of the rows hold multiples of a half, so that experts tie within and around the chosen; in one all tie."""
    logits_TE = torch.randn(tokens, experts, generator=torch.Generator().manual_seed(3)) * 2
    logits_TE[::2] = (logits_TE[::2] * 2).round() / 2
    logits_TE[0] = 0
    assert (logits_TE.sort(dim=1).values.diff(dim=1) == 0).any(dim=1).sum() > tokens / 4
    return logits_TE.to(dtype)


def outputs_and_gradient(routing, logits_TE, graded):
    logits_TE = logits_TE.clone().requires_grad_(graded)
    with torch.set_grad_enabled(graded):
        weights_TE, routing_map_TE = routing(logits_TE)
    if not graded:
        return weights_TE, routing_map_TE
    upstream_TE = torch.linspace(-1, 1, weights_TE.numel()).view_as(weights_TE).to(weights_TE.dtype)
    return weights_TE.detach(), routing_map_TE, torch.autograd.grad(weights_TE, logits_TE, upstream_TE)[0]


def assert_bitwise(ours, theirs):
    assert len(ours) == len(theirs)
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.dtype == other.dtype and torch.equal(mine, other)


@pytest.mark.parametrize("graded", [True, False])
@pytest.mark.parametrize("factor", [None, 2.5])
@pytest.mark.parametrize("pre_softmax", [True, False])
@pytest.mark.parametrize("k", [1, 3, 8])
@pytest.mark.parametrize("dtype", DTYPES)
def test_top_k_is_megatrons(dtype, k, pre_softmax, factor, graded):
    logits_TE = logits_with_ties(dtype=dtype)
    ours = outputs_and_gradient(lambda x: top_k_routing(x, k, pre_softmax, factor), logits_TE, graded)
    megatron = lambda x: topk_routing_with_score_function(  # noqa: E731
        x, k, use_pre_softmax=pre_softmax, scaling_factor=factor
    )
    assert_bitwise(ours, outputs_and_gradient(megatron, logits_TE, graded))
    assert (ours[1].sum(dim=1) == k).all()


@pytest.mark.parametrize("graded", [True, False])
@pytest.mark.parametrize("max_experts", [None, 1, 3])
@pytest.mark.parametrize("top_p", [0.3, 0.5, 1.0])
@pytest.mark.parametrize("dtype", DTYPES)
def test_top_p_is_the_training_routers(dtype, top_p, max_experts, graded):
    logits_TE = logits_with_ties(dtype=dtype)

    def training(x):
        weights_TE, routing_map_TE = router.top_p_routing(torch.softmax(x, -1, dtype=torch.float32), top_p, max_experts)
        return weights_TE.type_as(x), routing_map_TE

    ours = outputs_and_gradient(lambda x: top_p_routing(x, top_p, max_experts), logits_TE, graded)
    assert_bitwise(ours, outputs_and_gradient(training, logits_TE, graded))
    assert (ours[1].sum(dim=1) >= 1).all()
    fewest = {0.3: 3, 0.5: 4, 1.0: 8}[top_p]  # of eight of one eighth; 0.5 is reached exactly
    assert ours[1][0].sum() == min(fewest, max_experts or 8) and ours[1][0, 0]


@pytest.mark.parametrize("router_dtype", [None, "float32"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_gate_is_megatrons(dtype, router_dtype):
    gate = HMoERouter(tiny_config(router_dtype=router_dtype), 5).to(dtype)
    x_TH = torch.randn(40, 32).to(dtype)
    with torch.no_grad():
        gate.weight.normal_()
        theirs = router_gating_linear(x_TH, gate.weight, None, torch.float32 if router_dtype else dtype)
        assert_bitwise([gate(x_TH)], [theirs])


def test_router_in_float32_stays_so_under_autocast():
    x_TH = torch.randn(6, 32)
    gates = [HMoERouter(tiny_config(router_dtype=dtype), 5) for dtype in ("float32", None)]
    with torch.autocast("cpu", torch.bfloat16):
        assert [gate(x_TH).dtype for gate in gates] == [torch.float32, torch.bfloat16]


def losses_of_training(logits_TE, widths, valid_T, config):
    """As hmoe_megatron.moe.router.HMoERouter puts hmoe_megatron.moe.losses together on one rank."""
    width_E = torch.tensor(widths)
    routing_map_TE = route(logits_TE, config)[1]
    counts_E = (routing_map_TE if valid_T is None else routing_map_TE & valid_T.unsqueeze(-1)).sum(dim=0)
    num_tokens = len(logits_TE) if valid_T is None else valid_T.sum()
    log_probs_TE = torch.log_softmax(logits_TE, dim=-1, dtype=torch.float32)
    probs_TE = log_probs_TE.exp()
    prob_sum_E = (probs_TE if valid_T is None else probs_TE * valid_T.unsqueeze(-1)).sum(dim=0)
    relative_width_E = width_E / width_E.float().mean()
    return (
        config.p_penalty_coeff * losses.p_penalty(counts_E, prob_sum_E, relative_width_E, num_tokens)
        + config.load_balance_coeff * losses.load_balance(counts_E, prob_sum_E, num_tokens)
        + config.router_entropy_coeff * losses.router_entropy(log_probs_TE, valid_T, num_tokens)
    )


COEFFS = [(0.1, 0.0, 0.0), (0.0, 0.02, 0.0), (0.0, 0.0, 0.03), (0.1, 0.02, 0.03), (0.0, 0.0, 0.0)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("padding", [0, 7])
@pytest.mark.parametrize("kind", [TOP_K, TOP_P], ids=["topk", "topp"])
@pytest.mark.parametrize("coeffs", COEFFS)
def test_losses_are_those_of_training(coeffs, kind, padding, dtype):
    names = ("p_penalty_coeff", "load_balance_coeff", "router_entropy_coeff")
    config = tiny_config(**kind, **dict(zip(names, coeffs, strict=True)))
    valid_T = torch.arange(40) >= padding if padding else None
    results = []
    for loss in (router_loss, losses_of_training):
        logits_TE = logits_with_ties(experts=4, tokens=40, dtype=dtype).requires_grad_()
        value = loss(logits_TE, [16, 24, 40, 8], valid_T, config)
        results.append((value, torch.autograd.grad(value, logits_TE)[0]))
    (value, gradient_TE), (expected, expected_TE) = results
    assert value.dtype == torch.float32 and (value > 0) == any(coeffs)
    torch.testing.assert_close(value, expected, rtol=LOSS_RTOL, atol=0)
    rtol = LOSS_RTOL if dtype == torch.float32 else 2**-8  # one rounding of bf16
    torch.testing.assert_close(gradient_TE, expected_TE, rtol=rtol, atol=LOSS_RTOL * float(expected_TE.abs().max()))
    assert not gradient_TE[:padding].any()


@pytest.mark.parametrize("kind", [TOP_K, TOP_P], ids=["topk", "topp"])
def test_losses_of_the_model_are_the_sum_over_its_layers_without_padding(kind):
    coeffs = {"p_penalty_coeff": 0.1, "load_balance_coeff": 0.02, "router_entropy_coeff": 0.03}
    model = tiny_model(**kind, **coeffs)
    ids_BS = token_ids()
    mask_BS = torch.ones_like(ids_BS)
    mask_BS[0, :5] = 0
    kwargs = {"attention_mask": mask_BS, "labels": ids_BS.masked_fill(mask_BS == 0, -100)}
    plain = model(ids_BS, **kwargs)
    outputs = model(ids_BS, output_router_logits=True, **kwargs)
    assert plain.router_logits is None and plain.aux_loss is None
    assert [tuple(logits.shape) for logits in outputs.router_logits] == [(24, 4), (24, 3)]
    widths = [widths for widths in model.config.expert_widths if widths]
    valid_T = mask_BS.flatten().bool()
    expected = sum(
        losses_of_training(logits_TE, layer, valid_T, model.config)
        for logits_TE, layer in zip(outputs.router_logits, widths, strict=True)
    )
    torch.testing.assert_close(outputs.aux_loss, expected, rtol=LOSS_RTOL, atol=0)
    torch.testing.assert_close(outputs.loss, plain.loss + expected, rtol=LOSS_RTOL, atol=0)
    gates = [layer.mlp.gate.weight for layer in model.model.layers if hasattr(layer.mlp, "gate")]
    ours = torch.autograd.grad(outputs.loss, gates, retain_graph=True)
    theirs = torch.autograd.grad(plain.loss, gates), torch.autograd.grad(expected, gates)
    for gradient, of_text, of_router in zip(ours, *theirs, strict=True):
        assert of_router.abs().max() > 0
        torch.testing.assert_close(gradient, of_text + of_router, rtol=1e-4, atol=1e-6)


def test_left_padding_changes_no_loss():
    model = tiny_model(p_penalty_coeff=0.1, output_router_logits=True)
    ids_BS = token_ids(rows=1)
    alone = model(ids_BS, labels=ids_BS)
    padded_BS = torch.nn.functional.pad(ids_BS, (6, 0))
    mask_BS = torch.nn.functional.pad(torch.ones_like(ids_BS), (6, 0))
    labels_BS = padded_BS.masked_fill(torch.arange(18) <= 6, -100)  # a first token is never a target
    padded = model(padded_BS, attention_mask=mask_BS, labels=labels_BS)
    counted = model(padded_BS, labels=labels_BS)
    torch.testing.assert_close([padded.aux_loss, padded.loss], [alone.aux_loss, alone.loss], rtol=1e-5, atol=0)
    assert abs(counted.aux_loss - alone.aux_loss) > 1e-3


@torch.no_grad()
def test_losses_after_a_cached_prefix_take_the_end_of_the_mask():
    model = tiny_model(p_penalty_coeff=0.1, output_router_logits=True)
    ids_BS, mask_BS = token_ids(), torch.ones(2, 12, dtype=torch.long)
    mask_BS[0, :6] = 0  # one padding token of row 0 is left behind the prefix
    cache = model(ids_BS[:, :5], attention_mask=mask_BS[:, :5], use_cache=True).past_key_values
    outputs = model(ids_BS[:, 5:], attention_mask=mask_BS, past_key_values=cache, labels=ids_BS[:, 5:])
    valid_T = mask_BS[:, 5:].flatten().bool()
    expected = sum(
        router_loss(logits_TE, widths, valid_T, model.config)
        for logits_TE, widths in zip(outputs.router_logits, [[16, 24, 40, 8], [8, 8, 24]], strict=True)
    )
    assert valid_T.sum() == 13 and outputs.aux_loss == expected


def test_micro_batches_add_up_by_their_targets():
    """What Trainer does under gradient accumulation: the losses of a step add up to the mean over its targets."""
    model = tiny_model(p_penalty_coeff=0.1, output_router_logits=True)
    batches = [token_ids(rows=3, length=12), token_ids(rows=1, length=7, seed=2)]
    targets = [3 * 11, 6]
    alone = [model(ids, labels=ids).loss.item() for ids in batches]
    count = torch.tensor(sum(targets))
    parts = [model(ids, labels=ids, num_items_in_batch=count).loss.item() for ids in batches]
    expected = sum(loss * count for loss, count in zip(alone, targets, strict=True)) / sum(targets)
    assert abs(sum(parts) - expected) < 1e-5


def test_padding_that_cannot_be_seen_is_refused():
    model = tiny_model(p_penalty_coeff=0.1, output_router_logits=True)
    with pytest.raises(ValueError, match=r"shape \(2, 1, 12, 12\).*give a mask \[batch, positions\]"):
        model(token_ids(), attention_mask=torch.ones(2, 1, 12, 12, dtype=torch.bool), labels=token_ids())
