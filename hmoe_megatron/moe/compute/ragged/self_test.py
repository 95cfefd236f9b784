"""Whether a device computes the kernels right: layers against the reference in higher precision.

A wrong result of a compiler for one architecture is silent (Triton 3.7.1 on sm_103: dx). So before anything is trained,
each variant of the kernels that a run will use is checked on the device at hand: its dtype, hidden size and alignment
of widths, few rows and many, gradients written and added, with and without a backward pass to come. The tests and
benchmarks/gpu check more cases by ``errors``.
"""

import contextlib
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch

from hmoe_megatron.moe.compute.compute import ExpertCompute
from hmoe_megatron.moe.compute.flat import fc1_pieces, fc2_pieces
from hmoe_megatron.moe.compute.ragged.experts import ragged_experts
from hmoe_megatron.moe.compute.reference import reference_experts

# Rows of three pieces, one without: few and many by tiles.FEW_ROWS.
ROWS = ((130, 0, 70), (300, 0, 700))
# Norm of the error over that of the result. Measured on an H100 (docs/gpu.md): 2.3e-3 to 3.5e-3 in bf16; fp16 keeps 3
# bits more; in fp32 sums of some thousand products.
BOUNDS = {torch.bfloat16: 1.2e-2, torch.float16: 2e-3, torch.float32: 1e-5}
LARGEST = 10  # times the bound: largest error over the largest value
ADDED = 0.25  # what a gradient is added to
MANY_PIECES = 64  # above it the schedule is compiled for more


class Case(NamedTuple):
    """A layer and its batch. accumulate: weight gradients are added to a ``main_grad`` of this dtype."""

    hidden: int
    widths: tuple[int, ...]
    rows: tuple[int, ...]
    accumulate: bool = False
    grad_dtype: torch.dtype = torch.float32


class Variants(NamedTuple):
    """What a run will need of the kernels. alignments: of the widths of its layers; pieces: the most on a rank."""

    hidden: int
    dtype: torch.dtype
    alignments: frozenset[int]
    pieces: int = 1
    grad_dtype: torch.dtype = torch.float32
    keep_hidden: bool = False

    def cases(self):
        """Layers that use each of them once."""
        for power in sorted(self.alignments):
            widths = (power, 3 * power, power * (2 * (512 // (2 * power)) + 1))
            for rows in ROWS:
                for accumulate in (False, True):
                    yield Case(self.hidden, widths, rows, accumulate, self.grad_dtype)
            if self.pieces > MANY_PIECES:
                yield Case(self.hidden, (power,) * self.pieces, (3, 0) * (self.pieces // 2) + (1,) * (self.pieces % 2))


def alignment(widths) -> int:
    """Largest power of two, up to 256, that divides all widths: what kernels are specialised for."""
    return next(power for power in (256, 128, 64, 32, 16, 8, 4, 2, 1) if not any(width % power for width in widths))


def self_test(variants: Variants, device: torch.device) -> str:
    """What is wrong, or ""."""
    compute = partial(ragged_experts, keep_hidden=variants.keep_hidden)
    for case in variants.cases():
        wrong = problem(case, variants.dtype, device, compute)
        if wrong := wrong or problem_without_gradients(case, variants.dtype, device, compute):
            return f"{wrong} ({case})"
    return ""


def problem(case: Case, dtype, device, compute: ExpertCompute, exact=torch.float32, seed=0) -> str:
    """What ``compute`` gets wrong, or "". exact: dtype of the reference."""
    return _first_over(errors(case, dtype, device, compute, exact, seed), BOUNDS[dtype])


def problem_without_gradients(case: Case, dtype, device, compute: ExpertCompute, seed=0) -> str:
    """Where ``compute`` gives another y with no backward pass to come (g and u are then not written), or ""."""
    (x, *others), _ = drawn(case, device, seed)
    x, probs, fc1, fc2 = x.to(dtype), others[0], others[1].to(dtype), others[2].to(dtype)
    with poisoned():
        y = compute(x.requires_grad_(), probs, list(case.rows), fc1, fc2, case.widths).detach()
        with torch.no_grad():
            again = compute(x, probs, list(case.rows), fc1, fc2, case.widths)
    return _first_over({"y without gradients": _apart(again.float(), y.float())}, BOUNDS[dtype])


def _first_over(errors: dict[str, tuple], bound: float) -> str:
    for name, (norm, largest) in errors.items():
        if not (norm < bound and largest < LARGEST * bound):  # a NaN too
            return f"{name} is off by {norm:.1e} of its norm, by {largest:.1e} of its largest value"
    return ""


def errors(case: Case, dtype, device, compute: ExpertCompute, exact=torch.float32, seed=0) -> dict[str, tuple]:
    """{"y", "dx", "dp", "dW1", "dW2": (norm of the error over that of the result, largest error over largest value)};
    "empty": infinite where a piece without rows has a gradient."""
    given, dy = drawn(case, device, seed)
    rounded = [tensor.to(dtype) if tensor.dim() > 1 else tensor for tensor in (*given, dy)]
    with poisoned():
        found = results(case, rounded[:4], rounded[4], compute)
    expected = results(case, [t.to(exact) for t in rounded[:4]], rounded[4].to(exact), reference_experts)
    named = zip(("y", "dx", "dp", "dW1", "dW2"), found, expected, strict=True)
    apart = {name: _apart(value.to(exact), wanted) for name, value, wanted in named}
    empty = [
        part.any()
        for take, grad in ((fc1_pieces, found[3]), (fc2_pieces, found[4]))
        for part, rows in zip(take(grad, case.widths), case.rows, strict=True)
        if not rows
    ]
    return apart | {"empty": (float("inf"),) * 2 if any(empty) else (0.0, 0.0)}


def _apart(value, wanted) -> tuple[float, float]:
    if not wanted.numel():
        return 0.0, 0.0
    error, least = value - wanted, torch.finfo(wanted.dtype).tiny
    return (
        float(error.norm() / wanted.norm().clamp_min(least)),
        float(error.abs().max() / wanted.abs().max().clamp_min(least)),
    )


def drawn(case: Case, device, seed=0):
    """([x, probs, fc1, fc2], dy) in fp32, fresh for every seed; outputs are about 1."""
    generator = torch.Generator(device).manual_seed(seed)

    def draw(*shape):
        return torch.randn(shape, generator=generator, device=device)

    rows, width = sum(case.rows), sum(case.widths)
    probs = torch.rand(rows, generator=generator, device=device) + 0.05
    fc1, fc2 = draw(2 * width, case.hidden) * case.hidden**-0.5, draw(width, case.hidden) * max(case.widths) ** -0.5
    return [draw(rows, case.hidden), probs, fc1, fc2], draw(rows, case.hidden)


def results(case: Case, tensors, dy, compute: ExpertCompute | Callable) -> list[torch.Tensor]:
    """[y, dx, dp, dW1, dW2] of one forward and backward pass. Only the ragged backend knows of ``main_grad``."""
    tensors = [tensor.detach().clone().requires_grad_() for tensor in tensors]
    weights = tensors[2:]
    if case.accumulate and compute is not reference_experts:
        for weight in weights:
            weight.main_grad = torch.full(weight.shape, ADDED, device=weight.device, dtype=case.grad_dtype)
    y = compute(*tensors[:2], list(case.rows), *weights, case.widths)
    y.backward(dy)
    grads = [tensor.grad for tensor in tensors]
    if hasattr(weights[0], "main_grad"):
        grads[2:] = [weight.main_grad.float() - ADDED for weight in weights]
    return [y.detach(), *grads]


@contextlib.contextmanager
def poisoned():
    """New memory holds NaN: what is read before it is written, or never written, shows."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.utils.deterministic.fill_uninitialized_memory = fill
