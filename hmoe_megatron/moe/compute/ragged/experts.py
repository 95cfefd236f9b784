"""The autograd node of a layer's experts, and the backend ``triton`` made of it.

Kept for the backward pass, a row and width of a piece: g and u, and with ``keep_hidden`` h as well; without it h is
computed again from them, over dh. The gradients of g and u are written over g and u: for a second backward pass through
the same node (retain_graph) they are computed again from x. Without gradients (no_grad) g and u are never written.
"""

import functools

import torch

from hmoe_megatron.moe.compute.flat import new_gradient
from hmoe_megatron.moe.compute.main_grad import added, main_grads
from hmoe_megatron.moe.compute.ragged import launches
from hmoe_megatron.moe.compute.ragged.schedule import Layer
from hmoe_megatron.moe.compute.ragged.tiles import TILES, VECTOR, tile_class, unsupported
from hmoe_megatron.moe.compute.reference import reference_experts


def ragged_experts(x_RH, probs_R, rows, fc1, fc2, widths, keep_hidden=False):
    """See ExpertCompute. What the kernels can't take (see ``unsupported``) goes to the reference."""
    aligned = fc1.data_ptr() % 16 == 0 and fc2.data_ptr() % 16 == 0
    if not aligned or unsupported(tuple(widths), x_RH.shape[1], x_RH.dtype):
        return reference_experts(x_RH, probs_R, rows, fc1, fc2, widths)
    layer = layer_of(tuple(widths), x_RH.shape[1], x_RH.dtype, x_RH.device, x_RH.shape[0])
    # Pinned, so that the copy waits for nothing.
    rows_E = torch.tensor(rows, dtype=torch.int32, pin_memory=x_RH.is_cuda).to(x_RH.device, non_blocking=True)
    elements = sum(count * width for count, width in zip(rows, widths, strict=True))
    return ragged_swiglu(x_RH, probs_R, fc1, fc2, rows_E, layer, elements, keep_hidden)


def layer_of(widths: tuple[int, ...], hidden: int, dtype: torch.dtype, device: torch.device, rows: int) -> Layer:
    """The layer of these widths with the tiles for so many rows in all on this device; made once."""
    return _layer(widths, hidden, tile_class(dtype, _shared_memory_bytes(device), rows / len(widths)), device)


@functools.cache
def _shared_memory_bytes(device: torch.device) -> int:
    if device.type != "cuda":
        return 0
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin


@functools.cache
def _layer(widths: tuple[int, ...], hidden: int, tiles: str, device: torch.device) -> Layer:
    return Layer(widths, hidden, TILES[tiles], device)


def ragged_swiglu(x_RH, probs_R, fc1, fc2, rows_E, layer: Layer, elements: int, keep_hidden: bool = False):
    """y [R, H] = W2 (p * silu(Wg x) * (Wu x)) of each row by its piece, rows sorted by piece.

    rows_E: rows of each piece, integers on the device, sum R (not looked at: that would wait for the device).
    fc1 [2 W, H], fc2 [W, H]: all pieces (see flat.py), W the sum of ``layer.widths``. elements: sum of rows x width, or
    more: nothing here then depends on the rows but through the device, and a CUDA graph may hold it.

    Where both weights have Megatron's ``main_grad`` their gradients are added to it, as with
    --gradient-accumulation-fusion, and what autograd gets for them holds nothing.
    """
    graph = torch.is_grad_enabled() and any(t.requires_grad for t in (x_RH, probs_R, fc1, fc2))
    return _RaggedSwiGLU.apply(x_RH, probs_R, fc1, fc2, rows_E, layer, max(elements, 1), graph, keep_hidden)


class _RaggedSwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_RH, probs_R, fc1, fc2, rows_E, layer, elements, graph, keep_hidden):
        x_RH, probs_R = _rows(x_RH), probs_R.contiguous()
        ctx.main_grads = main_grads(fc1, fc2)
        ctx.weights = fc1, fc2  # to mark them: under hooks of saved tensors those saved are others
        ctx.layer, ctx.elements = layer, elements
        ctx.batch = layer.batch(rows_E, x_RH.shape[0], skip_empty=ctx.main_grads is not None)
        gate_up = x_RH.new_empty(2 * elements) if graph else None
        hidden = x_RH.new_empty(elements)
        launches.run_up(layer, ctx.batch, x_RH, probs_R, fc1, gate_up, hidden)
        y_RH = torch.empty_like(x_RH)
        launches.run_down(layer, ctx.batch, hidden, fc2, y_RH)
        ctx.save_for_backward(x_RH, probs_R, fc1, fc2)
        ctx.gate_up, ctx.hidden = gate_up, hidden if keep_hidden else None
        return y_RH

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy_RH):
        x_RH, probs_R, fc1, fc2 = ctx.saved_tensors
        layer, batch, dy_RH = ctx.layer, ctx.batch, _rows(dy_RH)
        needs_x, needs_probs, needs_fc1, needs_fc2 = ctx.needs_input_grad[:4]
        gate_up, ctx.gate_up = ctx.gate_up, None
        if gate_up is None:
            gate_up = x_RH.new_empty(2 * ctx.elements)
            launches.run_up(layer, batch, x_RH, probs_R, fc1, gate_up, x_RH.new_empty(ctx.elements))
        dh = x_RH.new_empty(ctx.elements)
        launches.run_hidden_grad(layer, batch, dy_RH, fc2, dh)
        again = dh if ctx.hidden is None else None
        dprobs_R = torch.empty_like(probs_R)
        launches.run_activation_grad(layer, batch, dh, probs_R, gate_up, gate_up, again, dprobs_R)
        hidden = dh if ctx.hidden is None else ctx.hidden
        del dh, again
        main1, main2 = ctx.main_grads or (None, None)
        weight1, weight2 = ctx.weights
        dfc2 = dfc1 = None
        if needs_fc2:
            dfc2 = _weight_grad(launches.run_fc2_grad, layer, batch, hidden, dy_RH, weight2, main2, sum(layer.widths))
        del hidden
        if needs_fc1:
            rows = 2 * sum(layer.widths)
            dfc1 = _weight_grad(launches.run_fc1_grad, layer, batch, gate_up, x_RH, weight1, main1, rows)
        dx_RH = None
        if needs_x:
            dx_RH = torch.empty_like(x_RH)
            launches.run_input_grad(layer, batch, gate_up, fc1, dx_RH)
        return dx_RH, dprobs_R if needs_probs else None, dfc1, dfc2, None, None, None, None, None


def _rows(x_RH):
    """With rows that 16-byte accesses can read."""
    aligned = x_RH.stride(1) == 1 and x_RH.stride(0) % VECTOR == 0 and x_RH.data_ptr() % 16 == 0
    return x_RH if aligned else x_RH.clone(memory_format=torch.contiguous_format)


def _weight_grad(run, layer, batch, by_width, by_hidden, weight, main_grad, rows: int):
    """Gradient of a weight with so many rows of pieces; added to ``main_grad`` if there is one, and then a tensor
    without memory."""
    if main_grad is None:
        grad = new_gradient(weight, rows)
        run(layer, batch, by_width, by_hidden, grad, accumulate=False)
        return grad
    run(layer, batch, by_width, by_hidden, main_grad, accumulate=True)
    return added(weight)
