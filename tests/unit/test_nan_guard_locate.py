"""What is not finite: how it is recognised and named, what the user is told, and when idle experts are warned of."""

import numpy as np
import pytest
import torch

from hmoe_megatron.moe.experts import HMoEExperts
from hmoe_megatron.nan_guard.guard import remedy
from hmoe_megatron.nan_guard.locate import GRADIENTS, LOGITS, WEIGHTS, ModuleProbe, findings_of, kind_of
from hmoe_megatron.placement.plan import Piece
from hmoe_megatron.telemetry.counters import RoutingStats
from hmoe_megatron.telemetry.idle_experts import MOST_NAMED, IdleExperts

NAN, INFINITY = float("nan"), float("inf")


@pytest.mark.parametrize("value", [NAN, INFINITY, -INFINITY])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_one_value_that_is_not_finite_is_found(value, dtype):
    tensor = torch.zeros(3, 5, dtype=dtype)
    assert kind_of(tensor) is None
    tensor[1, 4] = value
    assert kind_of(tensor) == ("NaN" if value != value else "infinity")
    assert kind_of(torch.arange(3)) is None


def test_a_marked_layer_stays_marked_until_it_is_taken():
    stats, counts_E = RoutingStats([2, 5], 3), torch.tensor([1, 0, 1])
    assert stats.layers_not_finite() == []
    for layer in (2, 5):
        stats.record(layer, counts_E, 2)
    stats.record(5, counts_E, 2, (torch.tensor([1.0, -INFINITY]) * 0).sum())
    stats.record(5, counts_E, 2)
    assert stats.layers_not_finite() == [5]
    _, tokens_L, marked = stats.take([], torch.device("cpu"))
    assert tokens_L.tolist() == [2, 6] and marked == [5]
    assert stats.layers_not_finite() == []


class Experts(torch.nn.Module):
    """HMoEExperts without Megatron: expert 3 whole, and expert 7 from 16 to 40."""

    by_piece = HMoEExperts.by_piece

    def __init__(self):
        super().__init__()
        self.pieces = (Piece(3, 0, 8), Piece(7, 16, 40))
        self.piece_widths = (8, 24)
        self.linear_fc1_weight = torch.nn.Parameter(torch.zeros(64, 2))


class Model(torch.nn.Module):
    """As much of a GPT model as names need: a decoder layer, number 4 of the model, with a router and two pieces."""

    def __init__(self):
        super().__init__()
        layer = torch.nn.Module()
        layer.layer_number = 4
        layer.mlp = torch.nn.Module()
        layer.mlp.router = torch.nn.Linear(2, 2)
        layer.mlp.experts = Experts()
        self.decoder = torch.nn.Module()
        self.decoder.layers = torch.nn.ModuleList([layer])

    def forward(self, x):
        return self.decoder.layers[0].mlp.router(x)


def seen(model, failed=True):
    return {found.order[0]: found.text for found in findings_of([model], None, RoutingStats([3], 2), failed)}


def test_weights_and_gradients_are_named_by_expert_and_layer():
    model = Model()
    assert seen(model) == {}
    weight = model.decoder.layers[0].mlp.experts.linear_fc1_weight
    weight.main_grad = torch.zeros(64, 2)
    weight.main_grad[16, 1] = INFINITY
    gradient = "the gradient of linear_fc1_weight of expert 7 [16:40) in decoder layer 3 holds infinity"
    assert seen(model) == {GRADIENTS: gradient}
    with torch.no_grad():
        weight[15, 0] = NAN
    assert seen(model)[WEIGHTS] == "linear_fc1_weight of expert 3 [0:8) in decoder layer 3 holds NaN"
    assert WEIGHTS < LOGITS < GRADIENTS, "a bad weight explains bad logits, and these bad gradients"


@pytest.mark.parametrize(
    ("x", "text"),
    [
        (NAN, "NaN came into mlp.router in decoder layer 3"),
        (3e38, "mlp.router in decoder layer 3 gave infinity from finite input"),
    ],
)
def test_the_probe_names_the_first_module_and_leaves_no_hook(x, text):
    model = Model()
    with torch.no_grad():
        model.decoder.layers[0].mlp.router.weight.fill_(2.0)
    probe = ModuleProbe([model])
    model(torch.full((1, 2), x))
    assert [found.text for found in probe.findings] == [text]
    probe.remove()
    assert not any(module._forward_hooks for module in model.modules())


def test_the_remedy_names_the_step():
    assert "--iterations-to-skip 12" in remedy("reproduced", 12, "node7")
    assert "--iterations-to-skip" not in remedy("transient", 12, "node7")
    assert "node7" in remedy("transient", 12, "node7")
    assert all("untouched" in remedy(fault, 1, "node7") for fault in ("reproduced", "transient", "once", "norm"))


def idle_lines(counts, patience=10, interval=5):
    idle = IdleExperts([1, 4], patience)
    return [idle.look((i + 1) * interval, np.array(counts_LE), i * interval) for i, counts_LE in enumerate(counts)]


def test_an_idle_expert_is_warned_of_once_until_it_gets_tokens():
    used, idle = [[3, 1], [2, 2]], [[4, 0], [2, 2]]
    lines = idle_lines([used, idle, idle, idle, used, idle, idle, idle])
    warned = [i for i, line in enumerate(lines) if line]
    assert warned == [2, 6], "after 10 steps without a token, and again after it had one"
    assert lines[2].startswith("warning: step 15: no token for 10 steps: layer 1 expert 1. ")


def test_a_step_warns_in_one_line():
    lines = idle_lines([[[0, 0], [9, 0]]] * 3)
    assert [bool(line) for line in lines] == [False, True, False]
    assert "no token for 10 steps: layer 1 experts 0 1; layer 4 expert 1. " in lines[1]
    many = IdleExperts([0], 1).look(1, np.zeros((1, 100)), 0)
    assert "\n" not in many and f"15 and {100 - MOST_NAMED} more. " in many
