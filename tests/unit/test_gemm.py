"""Expert compute: every backend against float64, the zero-padded equal-width layer, and each other."""

from types import SimpleNamespace

import pytest
import torch

from hmoe_megatron.gemm import expert_compute
from hmoe_megatron.gemm.cpu import cpu_experts

HIDDEN = 24
WIDTHS = (8, 40, 16, 24)
CONFIG = SimpleNamespace(
    bias_activation_fusion=False, gradient_accumulation_fusion=False, activation_func_fp8_input_store=False
)
ROUTINGS = {
    "spread": (5, 9, 3, 7),
    "one expert without a token": (5, 0, 3, 7),
    "one token": (0, 0, 1, 0),
    "all on the widest": (0, 24, 0, 0),
    "no rows at all": (0, 0, 0, 0),
}
# Of the largest value: fp32 keeps 24 bits, sums have at most 40 terms, three products lie one behind the other.
FP32_BOUND = 2e-6
# bf16 keeps 8 bits; inputs are rounded once and the result once.
BF16_BOUND = 4e-2


def inputs(rows, dtype=torch.float32, widths=WIDTHS):
    generator = torch.Generator().manual_seed(3)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()

    x, probs = draw(sum(rows), HIDDEN), draw(sum(rows))
    fc1 = [draw(2 * width, HIDDEN) for width in widths]
    fc2 = [draw(HIDDEN, width) for width in widths]
    return x, probs, fc1, fc2


def float64_experts(x, probs, rows, fc1, fc2):
    """The formula of the package docstring, in float64, one row at a time."""
    outputs, first = [], 0
    for count, w1, w2 in zip(rows, fc1, fc2, strict=True):
        for row in range(first, first + count):
            gate, up = (w1.double() @ x[row].double()).chunk(2)
            outputs.append(w2.double() @ (probs[row].double() * gate * torch.sigmoid(gate) * up))
        first += count
    return torch.stack(outputs) if outputs else x.double() * 0


def close(got, want, bound=FP32_BOUND):
    """Whether the largest difference is within ``bound`` of the largest value."""
    return got.shape == want.shape and (not want.numel() or (got - want).abs().max() <= bound * want.abs().max())


def gradients(y, tensors):
    weights = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view_as(y)
    grads = torch.autograd.grad((y.double() * weights).sum(), tensors, allow_unused=True)
    zeros = (torch.zeros_like(t, dtype=torch.float64) for t in tensors)
    return [zero if grad is None else grad.double() for grad, zero in zip(grads, zeros, strict=True)]


@pytest.fixture(autouse=True)
def megatron_groups(monkeypatch):
    """The reference uses Megatron's linear, which wants a group; one process needs none of its communication."""
    from megatron.core.tensor_parallel import layers

    monkeypatch.setattr(layers, "get_tensor_model_parallel_group_if_none", lambda group, **_: group)


@pytest.mark.parametrize("rows", ROUTINGS.values(), ids=ROUTINGS)
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_value_and_gradients_against_float64(backend, rows):
    x, probs, fc1, fc2 = inputs(rows)
    tensors = [x, probs, *fc1, *fc2]
    y = expert_compute(backend, has_gpu=False)(x, probs, list(rows), fc1, fc2, CONFIG, None)
    expected = float64_experts(x, probs, rows, fc1, fc2)
    assert close(y.double(), expected)
    for got, want in zip(gradients(y, tensors), gradients(expected, tensors), strict=True):
        assert close(got, want)


@pytest.mark.parametrize("rows", ROUTINGS.values(), ids=ROUTINGS)
def test_backends_are_bitwise_equal_in_fp32(rows):
    x, probs, fc1, fc2 = inputs(rows)
    tensors = [x, probs, *fc1, *fc2]
    backends = [expert_compute(name, has_gpu=False) for name in ("reference", "cpu")]
    results = [backend(x, probs, list(rows), fc1, fc2, CONFIG, None) for backend in backends]
    assert torch.equal(*results)
    for reference, cpu in zip(*(gradients(y, tensors) for y in results), strict=True):
        assert torch.equal(reference, cpu)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_an_expert_without_rows_gets_exactly_zero_gradient(backend):
    rows = (5, 0, 3, 7)
    x, probs, fc1, fc2 = inputs(rows)
    y = expert_compute(backend, has_gpu=False)(x, probs, list(rows), fc1, fc2, CONFIG, None)
    y.sum().backward()
    assert not fc1[1].grad.any() and not fc2[1].grad.any()
    assert fc1[0].grad.any() and fc2[0].grad.any()


def test_zero_padding_to_one_width_is_the_same_function():
    """Oracle: every expert padded with zeros to the widest gives the same outputs, and the padding zero gradient."""
    rows, widest = (5, 9, 3, 7), max(WIDTHS)
    x, probs, fc1, fc2 = inputs(rows)
    padded1, padded2 = [], []
    for width, w1, w2 in zip(WIDTHS, fc1, fc2, strict=True):
        pad = widest - width
        blocks = torch.nn.functional.pad(w1.detach().view(2, width, HIDDEN), (0, 0, 0, pad))
        padded1.append(blocks.flatten(0, 1).requires_grad_())
        padded2.append(torch.nn.functional.pad(w2.detach(), (0, pad)).requires_grad_())
    y = cpu_experts(x, probs, list(rows), fc1, fc2, CONFIG, None)
    y_padded = cpu_experts(x, probs, list(rows), padded1, padded2, CONFIG, None)
    assert close(y, y_padded)
    grads, grads_padded = gradients(y, [*fc1, *fc2]), gradients(y_padded, [*padded1, *padded2])
    for index, width in enumerate(WIDTHS):
        d1 = grads_padded[index].view(2, widest, HIDDEN)
        d2 = grads_padded[len(WIDTHS) + index]
        assert close(d1[:, :width].flatten(0, 1), grads[index])
        assert close(d2[:, :width], grads[len(WIDTHS) + index])
        assert not d1[:, width:].any() and not d2[:, width:].any()


def test_pieces_add_up_to_the_expert():
    rows, cut, (width,) = (11,), 13, (40,)
    x, probs, (fc1,), (fc2,) = inputs(rows, widths=(width,))
    whole = cpu_experts(x, probs, [11], [fc1], [fc2], CONFIG, None)
    blocks = fc1.view(2, width, HIDDEN)
    parts = [
        cpu_experts(x, probs, [11], [blocks[:, lo:hi].flatten(0, 1)], [fc2[:, lo:hi]], CONFIG, None)
        for lo, hi in ((0, cut), (cut, width))
    ]
    assert close(parts[0] + parts[1], whole)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_bf16(backend):
    rows = (5, 0, 3, 7)
    x, probs, fc1, fc2 = inputs(rows, torch.bfloat16)
    y = expert_compute(backend, has_gpu=False)(x, probs, list(rows), fc1, fc2, CONFIG, None)
    assert y.dtype == torch.bfloat16
    expected = float64_experts(x, probs, rows, fc1, fc2)
    assert close(y.double(), expected, BF16_BOUND)


def test_the_cpu_backend_is_refused_on_a_gpu_machine():
    with pytest.raises(ValueError, match="--hmoe-gemm-backend cpu on a machine with a GPU: use auto or reference"):
        expert_compute("cpu", has_gpu=True)
    assert expert_compute("auto", has_gpu=False) is cpu_experts
    assert expert_compute("auto", has_gpu=True) is expert_compute("reference", has_gpu=True)
