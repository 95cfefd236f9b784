"""Arguments and grids of the kernels: one function a kind of work, nothing is allocated here."""

import functools

import torch

from hmoe_megatron.moe.compute.ragged import schedule
from hmoe_megatron.moe.compute.ragged.activation import activation_grad
from hmoe_megatron.moe.compute.ragged.row_products import from_hidden, hidden_grad, up
from hmoe_megatron.moe.compute.ragged.schedule import Batch, Layer
from hmoe_megatron.moe.compute.ragged.weight_products import weight_grad


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Of the device; on a CPU, where the interpreter runs one program after the other, a few."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 3


def _product(layer: Layer, tile, kind: int, dtype) -> tuple:
    """(grid, keywords) of a product."""
    programs = multiprocessors(layer.device) * tile.programs
    # fp32 operands as torch multiplies them.
    exact = dtype != torch.float32 or not torch.backends.cuda.matmul.allow_tf32
    return (programs,), {
        "KIND": kind,
        "PROGRAMS": programs,
        "BM": tile.rows,
        "BN": tile.columns,
        "BK": tile.depth,
        "PRECISION": "ieee" if exact else "tf32",
        "num_warps": tile.warps,
        "num_stages": tile.stages,
    }


def run_up(layer: Layer, batch: Batch, x, probs, fc1, gate_up, hidden) -> None:
    """h from x; [g | u] too where ``gate_up`` is a tensor."""
    tile = layer.tiles.up
    grid, how = _product(layer, tile, schedule.UP, x.dtype)
    up[grid](
        x,
        probs,
        fc1,
        hidden if gate_up is None else gate_up,
        hidden,
        layer.table,
        batch.tensor,
        layer.pieces,
        batch.places[schedule.UP],
        layer.hidden,
        x.stride(0),
        WRITE_GU=gate_up is not None,
        EVEN_H=layer.hidden % tile.depth == 0,
        EVEN_F=layer.divides(tile.columns // 2),
        **how,
    )


def run_down(layer: Layer, batch: Batch, hidden, fc2, y) -> None:
    """y from h."""
    _from_hidden(layer, batch, layer.tiles.down, schedule.DOWN, 1, hidden, fc2, y)


def run_input_grad(layer: Layer, batch: Batch, gate_up_grad, fc1, dx) -> None:
    """dx from [dg | du]."""
    _from_hidden(layer, batch, layer.tiles.input_grad, schedule.INPUT_GRAD, 2, gate_up_grad, fc1, dx)


def _from_hidden(layer, batch, tile, kind, times, a, weight, out):
    grid, how = _product(layer, tile, kind, a.dtype)
    from_hidden[grid](
        a,
        weight,
        out,
        layer.table,
        batch.tensor,
        layer.pieces,
        batch.places[kind],
        layer.hidden,
        out.stride(0),
        TIMES=times,
        TRANSPOSED=times == 1,
        EVEN_K=layer.divides(tile.depth, times),
        EVEN_H=layer.hidden % tile.columns == 0,
        **how,
    )


def run_hidden_grad(layer: Layer, batch: Batch, dy, fc2, dh) -> None:
    """dh from dy."""
    tile = layer.tiles.hidden_grad
    grid, how = _product(layer, tile, schedule.HIDDEN_GRAD, dy.dtype)
    hidden_grad[grid](
        dy,
        fc2,
        dh,
        layer.table,
        batch.tensor,
        layer.pieces,
        batch.places[schedule.HIDDEN_GRAD],
        layer.hidden,
        dy.stride(0),
        EVEN_H=layer.hidden % tile.depth == 0,
        EVEN_F=layer.divides(tile.columns),
        **how,
    )


def run_activation_grad(layer: Layer, batch: Batch, dh, probs, gate_up, gate_up_grad, hidden, dprobs) -> None:
    """[dg | du] and dp from dh and [g | u]; h too where ``hidden`` is a tensor. In place where two tensors are one."""
    if batch.rows:
        activation_grad[(batch.rows,)](
            dh,
            probs,
            gate_up,
            gate_up_grad,
            dh if hidden is None else hidden,
            dprobs,
            layer.table,
            batch.tensor,
            layer.pieces,
            batch.places[schedule.ACTIVATION],
            KIND=schedule.ACTIVATION,
            WRITE_HIDDEN=hidden is not None,
            BLOCK=layer.tiles.activation,
            num_warps=4,
            num_stages=1,
        )


def run_fc1_grad(layer: Layer, batch: Batch, gate_up_grad, x, out, accumulate: bool) -> None:
    """dW1, flat as fc1, written to or added to ``out``."""
    _weight_grad(layer, batch, layer.tiles.fc1_grad, schedule.FC1_GRAD, 2, gate_up_grad, x, out, accumulate)


def run_fc2_grad(layer: Layer, batch: Batch, hidden, dy, out, accumulate: bool) -> None:
    """dW2, flat as fc2, likewise."""
    _weight_grad(layer, batch, layer.tiles.fc2_grad, schedule.FC2_GRAD, 1, hidden, dy, out, accumulate)


def _weight_grad(layer, batch, tile, kind, times, by_width, by_hidden, out, accumulate):
    grid, how = _product(layer, tile, kind, by_width.dtype)
    weight_grad[grid](
        by_width,
        by_hidden,
        out,
        layer.table,
        batch.tensor,
        layer.pieces,
        batch.places[kind],
        layer.hidden,
        by_hidden.stride(0),
        TIMES=times,
        TRANSPOSED=times == 1,
        ACCUMULATE=accumulate,
        FLAT=tile.flat,
        EP2=layer.pieces_power_of_2,
        EVEN_F=layer.divides(tile.rows, times),
        EVEN_H=layer.hidden % tile.columns == 0,
        **how,
    )
