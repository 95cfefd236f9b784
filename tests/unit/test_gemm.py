"""Expert compute: every backend against float64, the zero-padded equal-width layer, and each other."""

import contextlib

import pytest
import torch

from hmoe_megatron.moe.compute import choice
from hmoe_megatron.moe.compute.choice import ExpertShapes, choose_compute
from hmoe_megatron.moe.compute.cpu import cpu_experts
from hmoe_megatron.moe.compute.flat import fc1_pieces, fc2_pieces
from hmoe_megatron.moe.compute.reference import reference_experts

HIDDEN = 24
WIDTHS = (8, 40, 16, 24)
BACKENDS = {"reference": reference_experts, "cpu": cpu_experts}
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

    return draw(sum(rows), HIDDEN), draw(sum(rows)), draw(2 * sum(widths), HIDDEN), draw(sum(widths), HIDDEN)


def float64_experts(x, probs, rows, fc1, fc2, widths=WIDTHS):
    """The formula of the package docstring, in float64, one row at a time."""
    outputs, first = [], 0
    for count, w1, w2 in zip(rows, fc1_pieces(fc1, widths), fc2_pieces(fc2, widths), strict=True):
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


@pytest.mark.parametrize("rows", ROUTINGS.values(), ids=ROUTINGS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_value_and_gradients_against_float64(backend, rows):
    x, probs, fc1, fc2 = inputs(rows)
    tensors = [x, probs, fc1, fc2]
    y = BACKENDS[backend](x, probs, list(rows), fc1, fc2, WIDTHS)
    expected = float64_experts(x, probs, rows, fc1, fc2)
    assert close(y.double(), expected)
    for got, want in zip(gradients(y, tensors), gradients(expected, tensors), strict=True):
        assert close(got, want)


@pytest.mark.parametrize("rows", ROUTINGS.values(), ids=ROUTINGS)
def test_backends_are_bitwise_equal_in_fp32(rows):
    x, probs, fc1, fc2 = inputs(rows)
    tensors = [x, probs, fc1, fc2]
    results = [backend(x, probs, list(rows), fc1, fc2, WIDTHS) for backend in BACKENDS.values()]
    assert torch.equal(*results)
    for reference, cpu in zip(*(gradients(y, tensors) for y in results), strict=True):
        assert torch.equal(reference, cpu)


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_expert_without_rows_gets_exactly_zero_gradient(backend):
    rows = (5, 0, 3, 7)
    x, probs, fc1, fc2 = inputs(rows)
    y = BACKENDS[backend](x, probs, list(rows), fc1, fc2, WIDTHS)
    y.sum().backward()
    for grads in (fc1_pieces(fc1.grad, WIDTHS), fc2_pieces(fc2.grad, WIDTHS)):
        assert [bool(grad.any()) for grad in grads] == [True, False, True, True]


def test_zero_padding_to_one_width_is_the_same_function():
    """Oracle: every expert padded with zeros to the widest gives the same outputs, and the padding zero gradient."""
    rows, widest = (5, 9, 3, 7), max(WIDTHS)
    x, probs, fc1, fc2 = inputs(rows)
    equal = [widest] * len(WIDTHS)
    padded1, padded2 = torch.zeros(2 * sum(equal), HIDDEN), torch.zeros(sum(equal), HIDDEN)
    for width, w1, p1 in zip(WIDTHS, fc1_pieces(fc1.detach(), WIDTHS), fc1_pieces(padded1, equal), strict=True):
        p1.view(2, widest, HIDDEN)[:, :width] = w1.view(2, width, HIDDEN)
    for width, w2, p2 in zip(WIDTHS, fc2_pieces(fc2.detach(), WIDTHS), fc2_pieces(padded2, equal), strict=True):
        p2[:, :width] = w2
    padded = [padded1.requires_grad_(), padded2.requires_grad_()]
    y = cpu_experts(x, probs, list(rows), fc1, fc2, WIDTHS)
    y_padded = cpu_experts(x, probs, list(rows), *padded, equal)
    assert close(y, y_padded)
    (d1, d2), (p1, p2) = gradients(y, [fc1, fc2]), gradients(y_padded, padded)
    for width, got, want in zip(WIDTHS, fc1_pieces(p1, equal), fc1_pieces(d1, WIDTHS), strict=True):
        got = got.view(2, widest, HIDDEN)
        assert close(got[:, :width].flatten(0, 1), want) and not got[:, width:].any()
    for width, got, want in zip(WIDTHS, fc2_pieces(p2, equal), fc2_pieces(d2, WIDTHS), strict=True):
        assert close(got[:, :width], want) and not got[:, width:].any()


def test_pieces_add_up_to_the_expert():
    rows, cut, (width,) = (11,), 13, (40,)
    x, probs, fc1, fc2 = inputs(rows, widths=(width,))
    whole = cpu_experts(x, probs, [11], fc1, fc2, [width])
    blocks, (w2,) = fc1.view(2, width, HIDDEN), fc2_pieces(fc2, [width])
    parts = [
        cpu_experts(x, probs, [11], blocks[:, lo:hi].flatten(0, 1), w2[:, lo:hi].reshape(hi - lo, HIDDEN), [hi - lo])
        for lo, hi in ((0, cut), (cut, width))
    ]
    assert close(parts[0] + parts[1], whole)


@pytest.mark.parametrize("backend", BACKENDS)
def test_bf16(backend):
    rows = (5, 0, 3, 7)
    x, probs, fc1, fc2 = inputs(rows, torch.bfloat16)
    y = BACKENDS[backend](x, probs, list(rows), fc1, fc2, WIDTHS)
    assert y.dtype == torch.bfloat16
    expected = float64_experts(x, probs, rows, fc1, fc2)
    assert close(y.double(), expected, BF16_BOUND)


SHAPES = ExpertShapes(64, torch.bfloat16, frozenset([(8, 16), (24, 40)]))


def chosen(name, has_gpu, shapes=SHAPES):
    compute, words = choose_compute(name, has_gpu, shapes)
    return getattr(compute, "func", compute).__name__, words


def test_the_cpu_backend_is_refused_on_a_gpu_machine():
    with pytest.raises(ValueError, match="--hmoe-gemm-backend cpu on a machine with a GPU: use auto or reference"):
        chosen("cpu", True)
    assert chosen("auto", False) == ("cpu_experts", "cpu")


@pytest.fixture
def a_gpu(monkeypatch):
    """A GPU of whose kernels self_test says what it is told to."""
    from hmoe_megatron.moe.compute.ragged import self_test

    said = {"capability": (9, 0), "wrong": "", "after": None}

    def test(variants, device):
        said["tested"] = variants, device
        if isinstance(said["wrong"], Exception):
            raise said["wrong"]
        return said["wrong"]

    monkeypatch.setattr(self_test, "self_test", test)
    choice._tested.cache_clear()
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: said["capability"])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA X")
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())

    def synchronize(device):
        if said["after"]:
            raise said["after"]

    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    return said


def test_auto_takes_triton_where_its_self_test_passes(a_gpu):
    name, words = chosen("auto", True)
    assert name == "ragged_experts" and words.startswith("triton, checked on this device in ")
    variants, device = a_gpu["tested"]
    assert variants == (64, torch.bfloat16, {8}, 2, torch.float32, False), "of both sets of widths 8 divides all"
    assert device == torch.device("cuda", 3)
    choose_compute("auto", True, SHAPES._replace(grad_dtype=torch.bfloat16), keep_hidden=True)
    assert a_gpu["tested"][0][4:] == (torch.bfloat16, True)


@pytest.mark.parametrize("wrong", ["dx off by 3.1e-01 of its norm", RuntimeError("ptxas died\nof something")])
def test_auto_takes_the_reference_where_it_fails_and_says_why(a_gpu, wrong):
    a_gpu["wrong"] = wrong
    choice._tested.cache_clear()
    name, words = chosen("auto", True)
    assert name == "reference_experts" and "\n" not in words
    assert "the triton kernels fail on NVIDIA X: " in words and str(wrong).splitlines()[0] in words
    with pytest.raises(ValueError, match="--hmoe-gemm-backend triton: the triton kernels fail on NVIDIA X"):
        chosen("triton", True)


def test_a_device_that_the_kernels_broke_ends_the_run_with_the_remedy(a_gpu):
    """An illegal access stays with the process: the reference would fail at its first product, far from the cause."""
    a_gpu["wrong"] = RuntimeError("an illegal memory access was encountered")
    a_gpu["after"] = RuntimeError("an illegal memory access was encountered")
    choice._tested.cache_clear()
    with pytest.raises(choice.DeviceFailed, match="broke NVIDIA X .*: use --hmoe-gemm-backend reference") as refused:
        chosen("auto", True)
    assert not refused.value.on_every_rank, "this rank alone may know: it says so itself"


def test_auto_takes_the_reference_where_there_is_nothing_to_run_triton_on(a_gpu, monkeypatch):
    a_gpu["capability"] = (7, 5)
    assert chosen("auto", True)[1].endswith("compute capability 7.5 is older than 8.0")
    monkeypatch.setattr(choice, "found_at", lambda module: None)
    assert chosen("auto", True)[1].endswith("Triton is not installed")
    with pytest.raises(ValueError, match="--hmoe-gemm-backend triton: Triton is not installed: use auto or reference"):
        chosen("triton", True)


def test_triton_needs_a_gpu(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(ValueError, match="--hmoe-gemm-backend triton: this machine has no GPU: use auto or reference"):
        chosen("triton", False)


def test_layers_that_the_kernels_cannot_take_are_named(a_gpu):
    name, words = chosen("auto", True, SHAPES._replace(widths=frozenset([(8, 16), (8, 37)])))
    assert name == "ragged_experts" and a_gpu["tested"][0].alignments == {8}
    assert words.endswith(
        "; 1 of 2 sets of pieces one after the other: width 37, which is not a multiple of 8 (--hmoe-width-multiple 8)"
    )
    name, words = chosen("auto", True, SHAPES._replace(hidden=40))
    assert name == "reference_experts" and "hidden size 40, which is not a multiple of 16" in words
