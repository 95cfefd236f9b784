"""Times of the experts alone, forward and backward: the triton backend, its kernels one by one, and what is beside it.

    python -m benchmarks.gpu.ffn [--tiny] [--only SHAPE]

Beside it: one dense FFN of the same FLOPs, torch's grouped_mm with equal widths and with all padded to the widest, and
a loop over the experts (the reference backend). The shapes are those of docs/gpu.md.
"""

import argparse
from functools import partial
from typing import NamedTuple

import torch
from torch.nn.functional import linear, silu

from benchmarks.gpu.rows import device, emit, median_ms, peak_bytes
from hmoe_megatron.moe.compute.choice import first_line
from hmoe_megatron.moe.compute.ragged import experts, launches
from hmoe_megatron.moe.compute.ragged.experts import ragged_experts
from hmoe_megatron.moe.compute.reference import reference_experts
from hmoe_megatron.widths import layer_widths


class Shape(NamedTuple):
    """A layer of experts and the rows of each."""

    hidden: int
    widths: tuple[int, ...]
    rows: tuple[int, ...]

    @property
    def elements(self) -> int:
        """Sum of rows x width: a product of it and the hidden size takes twice as many FLOPs, times the hidden size."""
        return sum(rows * width for rows, width in zip(self.rows, self.widths, strict=True))


def widths(experts_: int, mean: int) -> tuple[int, ...]:
    """9:11:...:23 around ``mean``, by 128 where that is possible."""
    by = 128 if mean >= 512 else 8
    return tuple(layer_widths("arithmetic:9:23", 1, experts_, experts_ * mean, by)[0])


def zipf(count: int, total: int) -> tuple[int, ...]:
    """Rows as 1 / rank, the ranks in a fixed random order."""
    weight = 1 / torch.arange(1, count + 1).float()
    weight = weight[torch.randperm(count, generator=torch.Generator().manual_seed(1))]
    rows = (weight / weight.sum() * total).int()
    rows[0] += total - rows.sum()
    return tuple(rows.tolist())


FINE = widths(64, 1408)
SHAPES = {
    "3B": Shape(1024, widths(8, 8192), (4096,) * 8),
    "0.4B": Shape(768, (864, 1056, 1248, 1440, 1632, 1824, 2016, 2208), (4096,) * 8),
    "fine": Shape(2048, FINE, (768,) * 64),
    "fine, Zipf": Shape(2048, FINE, zipf(64, 49152)),
    "fine-wide": Shape(4096, widths(32, 1536), (1024,) * 32),
    "fine, small": Shape(2048, FINE, (128,) * 64),
}
# By rows of an expert and by experts, of mean width 1,408.
SWEEP = {
    f"{count} x {rows} rows": Shape(2048, widths(count, 1408), (rows,) * count)
    for count, rows in ((8, 16), (8, 128), (8, 1024), (8, 8192), (64, 16), (64, 1024), (256, 16), (256, 128))
}
TINY = {"tiny": Shape(32, (24, 40), (5, 3))}
DTYPE = torch.bfloat16


def draw(*shape, scale=1.0, learns=True):
    tensor = torch.randn(shape, device=device(), dtype=DTYPE if torch.cuda.is_available() else torch.float32)
    return (tensor * scale).requires_grad_(learns)


def ways(shape: Shape, every: bool) -> dict:
    """{name: (forward, weights, FLOPs)} of what is timed. every: also what is far slower."""
    rows, total = sum(shape.rows), sum(shape.widths)
    x, probs = draw(rows, shape.hidden), torch.rand(rows, device=device(), requires_grad=True)
    flops = 18 * shape.elements * shape.hidden  # three matrices, forward and two backward
    fc1, fc2 = draw(2 * total, shape.hidden, scale=0.02), draw(total, shape.hidden, scale=0.02)
    added = [fc1.detach().clone().requires_grad_(), fc2.detach().clone().requires_grad_()]
    for weight in added:
        weight.main_grad = torch.zeros(weight.shape, device=weight.device)

    def with_backend(compute, weights):
        return lambda: compute(x, probs, list(shape.rows), *weights, shape.widths)

    found = {
        "triton": (with_backend(ragged_experts, (fc1, fc2)), [fc1, fc2], flops),
        "triton, gradients added to main_grad": (with_backend(ragged_experts, added), added, flops),
        "triton, h kept": (with_backend(partial(ragged_experts, keep_hidden=True), (fc1, fc2)), [fc1, fc2], flops),
        "dense FFN": _dense(x, max(8, round(shape.elements / rows / 64) * 64), rows),
    }
    if hasattr(torch, "_grouped_mm"):
        mean, widest = max(16, round(total / len(shape.widths) / 64) * 64), max(shape.widths)
        found["grouped_mm, equal widths"] = _grouped(x, shape.rows, mean, 18 * rows * mean * shape.hidden)
        if every:
            found["grouped_mm, padded to the widest"] = _grouped(x, shape.rows, widest, flops)
    if every:
        found["loop"] = (with_backend(reference_experts, (fc1, fc2)), [fc1, fc2], flops)
    return {way: (_backward(forward, [x, probs, *weights]), flops) for way, (forward, weights, flops) in found.items()}


def _dense(x, width, rows):
    w1, w2 = draw(2 * width, x.shape[1], scale=0.02), draw(x.shape[1], width, scale=0.02)
    return lambda: linear(swiglu(linear(x, w1)), w2), [w1, w2], 18 * rows * width * x.shape[1]


def _grouped(x, rows, width, flops):
    """Megatron's way of equal experts: two grouped products. The activation is compiled, as Megatron's is."""
    ends = torch.tensor(rows, device=x.device).cumsum(0).to(torch.int32)
    w1 = draw(len(rows), x.shape[1], 2 * width, scale=0.02)
    w2 = draw(len(rows), width, x.shape[1], scale=0.02)
    return lambda: torch._grouped_mm(swiglu(torch._grouped_mm(x, w1, offs=ends)), w2, offs=ends), [w1, w2], flops


def _swiglu(gate_up):
    gate, up = gate_up.chunk(2, -1)
    return silu(gate) * up


swiglu = torch.compile(_swiglu, dynamic=True) if torch.cuda.is_available() else _swiglu


def _backward(forward, leaves):
    """One forward and backward pass, which begins and ends without gradients."""
    dy = []

    def run():
        y = forward()
        if not dy:
            dy.append(torch.randn_like(y))
        y.backward(dy[0])
        for leaf in leaves:
            leaf.grad = None

    return run


def layer_rows(name: str, shape: Shape, every: bool) -> None:
    """Emits time, TFLOP/s and memory of each way, and the ratios to grouped_mm and to dense."""
    times = {}
    for way, (run, flops) in ways(shape, every).items():
        try:
            run()
            times[way] = median_ms(run, repeat_ms=200 if every else 30)
            emit(shape=name, way=way, ms=times[way], tflops=flops / times[way] / 1e9, bytes=peak_bytes(run))
        except Exception as error:
            emit(shape=name, way=way, failed=first_line(error))
    mine = times.get("triton")
    if mine:
        emit(shape=name, ratios={way: mine / ms for way, ms in times.items() if way != "triton"})


def kernel_rows(name: str, shape: Shape) -> None:
    """Emits time and rate of each kernel alone."""
    dtype, on = (DTYPE if torch.cuda.is_available() else torch.float32), device()
    rows, total, elements = sum(shape.rows), sum(shape.widths), shape.elements
    x, dy, y, dx = (draw(rows, shape.hidden, learns=False) for _ in range(4))
    probs, dprobs = torch.rand(rows, device=on), torch.empty(rows, device=on)
    fc1, fc2 = draw(2 * total, shape.hidden, learns=False), draw(total, shape.hidden, learns=False)
    gate_up, gate_up_grad = draw(2 * elements, learns=False), draw(2 * elements, learns=False)
    h, dh = draw(elements, learns=False), draw(elements, learns=False)
    main1, main2 = (torch.zeros(weight.shape, device=on) for weight in (fc1, fc2))
    layer = experts.layer_of(shape.widths, shape.hidden, dtype, on, rows)
    rows_E = torch.tensor(shape.rows, dtype=torch.int32, device=on)
    batch = layer.batch(rows_E, rows, skip_empty=False)
    product = 2 * elements * shape.hidden
    for kernel, run, flops in (
        ("schedule", lambda: layer.batch(rows_E, rows, skip_empty=False), 0),
        ("up", lambda: launches.run_up(layer, batch, x, probs, fc1, gate_up, h), 2 * product),
        ("down", lambda: launches.run_down(layer, batch, h, fc2, y), product),
        ("hidden grad", lambda: launches.run_hidden_grad(layer, batch, dy, fc2, dh), product),
        (
            "activation grad",
            lambda: launches.run_activation_grad(layer, batch, dh, probs, gate_up, gate_up_grad, h, dprobs),
            0,
        ),
        ("fc2 grad", lambda: launches.run_fc2_grad(layer, batch, h, dy, fc2, False), product),
        ("fc2 grad, added", lambda: launches.run_fc2_grad(layer, batch, h, dy, main2, True), product),
        ("fc1 grad", lambda: launches.run_fc1_grad(layer, batch, gate_up_grad, x, fc1, False), 2 * product),
        ("fc1 grad, added", lambda: launches.run_fc1_grad(layer, batch, gate_up_grad, x, main1, True), 2 * product),
        ("input grad", lambda: launches.run_input_grad(layer, batch, gate_up_grad, fc1, dx), 2 * product),
    ):
        run()
        ms = median_ms(run)
        rate = {"tflops": flops / ms / 1e9} if flops else {"gb_per_s": 6 * elements * dtype.itemsize / ms / 1e6}
        emit(shape=name, kernel=kernel, ms=ms, **({} if kernel == "schedule" else rate))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="one small shape, for a test on a CPU")
    parser.add_argument("--only", action="append", help="of the shapes these")
    given = parser.parse_args(argv)
    shapes = TINY if given.tiny else SHAPES
    for name, shape in shapes.items():
        if not given.only or name in given.only:
            layer_rows(name, shape, every=True)
            kernel_rows(name, shape)
    for name, shape in ({} if given.tiny or given.only else SWEEP).items():
        layer_rows(name, shape, every=False)


if __name__ == "__main__":
    main()
