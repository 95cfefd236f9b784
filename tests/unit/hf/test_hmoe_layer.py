"""The layer for any torch model: what it refuses, what it starts from, and that it needs torch alone."""

import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from tiny_models import TOP_K, TOP_P, tiny_model

from hmoe_megatron.config import HMoEConfig
from hmoe_megatron.hf.hmoe_layer import HMoELayer, LayerSettings, route, router_loss

REFUSED = [
    ({"hidden_size": 0}, r"hidden_size 0: give a whole number of at least 1"),
    ({"router": "sinkhorn"}, r"router 'sinkhorn' is not known: give one of 'topk', 'topp'"),
    ({"router": "topp", "router_top_p": 1.5}, r"router_top_p 1\.5: router 'topp' needs a probability above 0, at most"),
    ({"router": "topp", "router_top_p": 0.0}, r"router_top_p 0\.0: router 'topp' needs"),
    ({"router": "topp", "num_experts_per_tok": 2}, r"num_experts_per_tok 2 has no effect with router 'topp': remove"),
    ({"router_top_p": 0.6}, r"router_top_p 0\.6 has no effect with router 'topk': remove it"),
    ({"num_experts_per_tok": 2.0}, r"num_experts_per_tok 2\.0: give a whole number"),
    ({"expert_path": "grouped"}, r"expert_path 'grouped' is not known: give one of 'sorted', 'loop'"),
    ({"p_penalty_coeff": float("nan")}, r"p_penalty_coeff nan: give a finite number, 0 or more"),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED, ids=[str(changes) for changes, _ in REFUSED])
def test_settings_that_cannot_be_are_refused(changes, message):
    with pytest.raises(ValueError, match=rf"LayerSettings: {message}"):
        LayerSettings(**{"hidden_size": 16, **changes})


@pytest.mark.parametrize(
    ("k", "widths", "message"),
    [
        (3, (8, 16), r"num_experts_per_tok 3 is more than the 2 experts of widths_E: give at most 2"),
        (1, (8, 0), r"widths_E \(8, 0\): give a whole number of at least 1 for each expert"),
        (1, (8, 16.0), r"widths_E \(8, 16\.0\): give"),
        (1, (), r"widths_E \(\): give"),
    ],
)
def test_widths_that_cannot_be_are_refused(k, widths, message):
    with pytest.raises(ValueError, match=rf"HMoELayer: {message}"):
        HMoELayer(LayerSettings(16, num_experts_per_tok=k), widths)


@pytest.mark.parametrize("router", ["topk", "topp"])
def test_defaults_are_those_of_training(router):
    ours, training = (
        LayerSettings(16, router=router),
        HMoEConfig(router=router, top_p=0.6 if router == "topp" else None),
    )
    assert (ours.p_penalty_coeff, ours.load_balance_coeff) == (training.p_penalty_coeff, training.load_balance_coeff)
    assert (ours.router_top_p, ours.router_entropy_coeff) == (training.top_p, training.entropy_coeff)


def test_every_matrix_is_drawn_and_the_loss_is_the_layers():
    torch.manual_seed(0)
    layer = HMoELayer(LayerSettings(64, router="topp"), torch.tensor([24, 40, 8]))
    for name, weight in layer.named_parameters():
        bound = weight.shape[1] ** -0.5
        assert 0.9 * bound < weight.abs().max() <= bound and abs(weight.mean()) < bound / 10, name
    y_BSH, logits_TE = layer(torch.randn(3, 5, 64))
    assert y_BSH.shape == (3, 5, 64) and logits_TE.shape == (15, 3)
    assert layer.loss(logits_TE) == router_loss(logits_TE, [24, 40, 8], None, layer.config) > 0
    valid_T = torch.arange(15) < 9
    torch.testing.assert_close(layer.loss(logits_TE, valid_T), layer.loss(logits_TE[:9]))
    assert route(logits_TE, layer.config)[1].sum(dim=1).min() >= 1


@pytest.mark.parametrize("kind", [TOP_K, TOP_P], ids=["topk", "topp"])
def test_a_layer_of_an_exported_model_loads_by_name(kind):
    block = tiny_model(**kind).model.layers[0].mlp
    shared = {field.name: getattr(block.config, field.name) for field in fields(LayerSettings)}
    layer = HMoELayer(LayerSettings(**shared), block.config.expert_widths[0])
    layer.load_state_dict(block.state_dict())
    x_BSH = torch.randn(2, 7, 32)
    assert all(map(torch.equal, layer(x_BSH), block(x_BSH)))


# An import of what the package otherwise needs, or a process group, ends the process.
ALONE = """
import sys
for name in ("megatron", "transformers", "numpy", "scipy"):
    sys.modules[name] = None
import torch
def refuse(*_, **__):
    raise AssertionError("no process group is needed")
torch.distributed.init_process_group = torch.distributed.new_group = refuse
from hmoe_megatron.hf.hmoe_layer import HMoELayer, LayerSettings
from hmoe_megatron.widths import expert_widths
torch.manual_seed(0)
x_TH, target_TH = torch.randn(2, 64, 16)
for router in ("topk", "topp"):
    layer = HMoELayer(LayerSettings(16, router=router), expert_widths("arithmetic:9:23", 4, total_width=64))
    optimizer = torch.optim.Adam(layer.parameters(), lr=1e-2)
    losses = []
    for _ in range(20):
        y_TH, logits_TE = layer(x_TH)
        loss = (y_TH - target_TH).square().mean() + layer.loss(logits_TE)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0], losses
"""


def test_it_trains_without_megatron_transformers_and_process_groups():
    done = subprocess.run([sys.executable, "-c", ALONE], cwd=Path(__file__).parents[3], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
