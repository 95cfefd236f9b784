"""The two ways of computing experts of unequal widths agree, in outputs and gradients."""

import pytest
import torch
from tiny_models import FP32_BOUND, TOP_K, TOP_P, gradients, tiny_config, tiny_model, token_ids
from torch import nn

from hmoe_megatron.hf.hmoe_layer import HMoEMLP, loop_path, sorted_path

TOKENS, WIDTHS = 24, [16, 24, 40, 8]
# In bf16 the loop rounds after each expert, torch adds up the rows of one call in float32 and rounds once.
BOUNDS = {torch.float32: {"rtol": FP32_BOUND, "atol": 1e-6}, torch.bfloat16: {"rtol": 2**-6, "atol": 2**-6}}
MAPS = {
    "spread": lambda t, e: e in (t % 4, (t + 1) % 4),
    "an expert with no token": lambda t, e: e == t % 3,
    "an expert with one token": lambda t, e: e == (3 if t == 7 else t % 2),
    "all tokens on one expert": lambda t, e: e == 2,
    "all experts": lambda t, e: True,
}


def layer(kind, tokens=TOKENS, dtype=torch.float32):
    torch.manual_seed(0)
    experts = nn.ModuleList(HMoEMLP(tiny_config(), width) for width in WIDTHS).to(dtype)
    routing_map_TE = torch.tensor([[MAPS[kind](t, e) for e in range(4)] for t in range(tokens)])
    return experts, torch.randn(tokens, 32).to(dtype), torch.rand(tokens, 4).to(dtype) * routing_map_TE, routing_map_TE


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", MAPS)
def test_paths_agree(kind, dtype):
    results = []
    for path in (loop_path, sorted_path):
        experts, x_TH, weights_TE, routing_map_TE = layer(kind, dtype=dtype)
        x_TH.requires_grad_()
        weights_TE.requires_grad_()
        y_TH = path(experts, x_TH, weights_TE, routing_map_TE)
        assert y_TH.dtype == dtype
        (y_TH * torch.linspace(-1, 1, y_TH.numel()).view_as(y_TH).to(dtype)).sum().backward()
        results.append((y_TH, x_TH.grad, weights_TE.grad, gradients(experts)))
    torch.testing.assert_close(*results, **BOUNDS[dtype])


@pytest.mark.parametrize("path", [loop_path, sorted_path])
def test_an_expert_is_its_formula(path):
    experts, x_TH, weights_TE, routing_map_TE = layer("spread", dtype=torch.float64)
    expected_TH = torch.zeros_like(x_TH)
    for t in range(TOKENS):
        for e in routing_map_TE[t].nonzero().flatten().tolist():
            gate, up = experts[e].gate_proj.weight @ x_TH[t], experts[e].up_proj.weight @ x_TH[t]
            expected_TH[t] += experts[e].down_proj.weight @ (weights_TE[t, e] * gate / (1 + (-gate).exp()) * up)
    torch.testing.assert_close(path(experts, x_TH, weights_TE, routing_map_TE), expected_TH)


@pytest.mark.parametrize("path", [loop_path, sorted_path])
def test_an_expert_without_tokens_has_a_gradient_of_zero(path):
    experts, x_TH, weights_TE, routing_map_TE = layer("an expert with no token")
    path(experts, x_TH, weights_TE, routing_map_TE).sum().backward()
    idle = [not any(weight.grad.any() for weight in expert.parameters()) for expert in experts]
    assert idle == [False, False, False, True]


@pytest.mark.parametrize("kind", [*MAPS])
def test_without_gradients_only_chosen_experts_run(kind):
    experts, x_TH, weights_TE, routing_map_TE = layer(kind, tokens=1)
    ran = []
    for index, expert in enumerate(experts):
        expert.register_forward_hook(lambda *_, index=index: ran.append(index))
    with torch.no_grad():
        y_TH = sorted_path(experts, x_TH, weights_TE, routing_map_TE)
        assert ran == routing_map_TE[0].nonzero().flatten().tolist()
        torch.testing.assert_close(y_TH, loop_path(experts, x_TH, weights_TE, routing_map_TE))


@pytest.mark.parametrize("kind", [TOP_K, TOP_P], ids=["topk", "topp"])
def test_paths_agree_in_the_whole_model(kind):
    ids_BS = token_ids()
    logits, grads = [], []
    for path in ("loop", "sorted"):
        model = tiny_model(**kind, expert_path=path)
        outputs = model(ids_BS, labels=ids_BS)
        outputs.loss.backward()
        logits.append(outputs.logits)
        grads.append(gradients(model))
    torch.testing.assert_close(logits[0], logits[1], rtol=FP32_BOUND, atol=FP32_BOUND)
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-4, atol=1e-6)
