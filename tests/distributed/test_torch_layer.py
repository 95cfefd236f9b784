"""The layer in plain torch is the training's: same weights, same input, same output, losses and gradients."""

import pytest
import torch

from hmoe_megatron.hf import hmoe_layer
from hmoe_megatron.hf.hmoe_layer import HMoELayer, LayerSettings, route
from tests.distributed.ranks import run_ranks
from tests.distributed.training_run import HIDDEN, SEQUENCE, TINY, build

WIDTHS = (8, 24, 40, 120)
# Of the largest element. Megatron has gate and up in one matrix product, the layer in two: another order of fp32 sums.
BOUND = 1e-6
COEFFS = {"p_penalty_loss": 0.7, "load_balance_loss": 0.3, "router_entropy_loss": 0.4}
SHARED = {"p_penalty_coeff": 0.7, "load_balance_coeff": 0.3}
TOP_K = LayerSettings(HIDDEN, num_experts_per_tok=3, **SHARED)
TOP_P = LayerSettings(HIDDEN, router="topp", router_top_p=0.6, router_entropy_coeff=0.4, **SHARED)
FLAGS = f"--hmoe-widths {','.join(map(str, WIDTHS))} --hmoe-p-penalty-coeff 0.7 --hmoe-load-balance-coeff 0.3 "
KINDS = {
    "topk": (TOP_K, f"{FLAGS} --moe-router-topk 3"),
    "topp": (TOP_P, f"{FLAGS} --hmoe-router topp --hmoe-top-p 0.6 --hmoe-router-entropy-coeff 0.4"),
}


def by_name(layer, of=lambda weight: weight):
    """{name of our state_dict: part} of Megatron's layer; of: a tensor of a weight's shape, such as its gradient."""
    parts = {"gate.weight": of(layer.router.weight)}
    for piece, fc1 in layer.experts.by_piece("linear_fc1_weight", of(layer.experts.linear_fc1_weight)):
        gate, up = fc1.chunk(2)
        parts |= {f"experts.{piece.expert}.gate_proj.weight": gate, f"experts.{piece.expert}.up_proj.weight": up}
    for piece, fc2 in layer.experts.by_piece("linear_fc2_weight", of(layer.experts.linear_fc2_weight)):
        parts[f"experts.{piece.expert}.down_proj.weight"] = fc2
    return parts


def joined(self, x, p_R):
    """HMoEMLP.forward with one product for gate and up, as Megatron has it."""
    weight = torch.cat([self.gate_proj.weight, self.up_proj.weight])
    gate, up = torch.nn.functional.linear(x, weight).chunk(2, dim=-1)
    return self.down_proj(torch.nn.functional.silu(gate) * up * p_R.unsqueeze(-1))


def named(routed, y_SBH, loss, grads):
    return {"weights": routed[0], "map": routed[1], "output": y_SBH.detach(), "losses": loss.detach(), **grads}


def both(settings, flags, is_joined):
    """[{name: tensor}] of Megatron's layer and of ours: routing, output, losses, gradients of input and weights."""
    from megatron.core.transformer.moe.moe_logging import get_moe_metrics_tracker

    _, _, model = build([*TINY, *flags.split()])
    theirs, ours = model.decoder.layers[0].mlp, HMoELayer(settings, WIDTHS)
    ours.load_state_dict(by_name(theirs))
    if is_joined:
        hmoe_layer.HMoEMLP.forward = joined  # in this rank's process alone
    routed = []
    theirs.router.register_forward_hook(lambda module, inputs, output: routed.extend(part.detach() for part in output))
    x_SBH, upstream_SBH = torch.randn(2, SEQUENCE, 4, HIDDEN, generator=torch.Generator().manual_seed(0))
    x_SBH.requires_grad_()
    y_SBH, _ = theirs(x_SBH)
    y_SBH.backward(upstream_SBH)
    logged = get_moe_metrics_tracker().metrics
    loss = sum(COEFFS[name] * entry.values[0] for name, entry in logged.items())
    grads = {"input": x_SBH.grad, **by_name(theirs, lambda weight: weight.grad)}
    found = named(routed, y_SBH, loss, grads)

    x_SBH = x_SBH.detach().requires_grad_()
    y_SBH, logits_TE = ours(x_SBH)
    loss = ours.loss(logits_TE)
    ((y_SBH * upstream_SBH).sum() + loss).backward()
    routed = [part.detach() for part in route(logits_TE, settings)]
    grads = {"input": x_SBH.grad, **{name: weight.grad for name, weight in ours.named_parameters()}}
    return found, named(routed, y_SBH, loss, grads)


@pytest.mark.parametrize("is_joined", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_it_is_the_layer_of_training(kind, is_joined):
    """Which experts with which weights: to the bit. The rest within BOUND; with gate and up in one product to the bit
    too, but for what the losses' gradient is in: there we add up the losses once, Megatron each by itself."""
    ((theirs, ours),) = run_ranks(1, both, *KINDS[kind], is_joined)
    assert theirs.keys() == ours.keys() and len(ours) == 6 + 3 * len(WIDTHS)
    assert len(ours["map"].sum(dim=1).unique()) > 1 or kind == "topk"
    bitwise = ours.keys() - {"losses", "input", "gate.weight"} if is_joined else {"weights", "map"}
    assert [name for name in bitwise if not torch.equal(theirs[name], ours[name])] == []
    for name in ours.keys() - bitwise:
        largest = float(theirs[name].abs().max())
        assert largest > 0.01, name
        torch.testing.assert_close(ours[name] / largest, theirs[name] / largest, rtol=0, atol=BOUND)
