"""CPU backend: one autograd node for all pieces of a layer, writing straight into the result.

bf16 and fp16 are computed in fp32, one piece at a time: CPUs without such units multiply bf16 several times slower than
fp32. Against the reference it saves the concatenation, the graph of small nodes, and the stored activation products.
"""

import functools

import torch

from hmoe_megatron.moe.compute.flat import fc1_pieces, fc2_pieces, new_gradient
from hmoe_megatron.moe.compute.main_grad import added, main_grads


def cpu_experts(x_RH, probs_R, rows, fc1, fc2, widths):
    """See ExpertCompute. In fp32 bitwise equal to the reference: same products in the same order."""
    return _CpuExperts.apply(x_RH, probs_R, rows, fc1, fc2, widths)


def _compute_dtype(x):
    return torch.float32 if x.dtype in (torch.bfloat16, torch.float16) else x.dtype


def _swiglu(gate_up_RF):
    gate, up = gate_up_RF.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate) * up


class _CpuExperts(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_RH, probs_R, rows, fc1, fc2, widths):
        dtype = _compute_dtype(x_RH)
        y_RH = torch.empty_like(x_RH)
        gate_ups = []
        by_rows = (t.split(rows) for t in (x_RH, probs_R, y_RH))
        for x, probs, y, w1, w2 in zip(*by_rows, fc1_pieces(fc1, widths), fc2_pieces(fc2, widths), strict=True):
            gate_up = x.to(dtype) @ w1.to(dtype).t()
            gate_ups.append(gate_up)
            hidden = _swiglu(gate_up).mul_(probs.to(dtype).unsqueeze(-1))
            _written(hidden, w2.to(dtype).t(), y)
        ctx.rows, ctx.widths, ctx.main_grads = rows, widths, main_grads(fc1, fc2)
        ctx.weights = fc1, fc2  # to mark them: under hooks of saved tensors those saved are others
        ctx.save_for_backward(x_RH, probs_R, fc1, fc2, *gate_ups)
        return y_RH

    @staticmethod
    def backward(ctx, dy_RH):
        x_RH, probs_R, fc1, fc2, *gate_ups = ctx.saved_tensors
        rows, widths, dtype = ctx.rows, ctx.widths, _compute_dtype(x_RH)
        dx_RH, dprobs_R = torch.empty_like(x_RH), torch.empty_like(probs_R)
        held = sum(widths)
        dfc1, dfc2 = ctx.main_grads or (new_gradient(fc1, 2 * held), new_gradient(fc2, held))
        weight_grad = _written
        if ctx.main_grads:
            # One piece at a time, in a buffer that stays in the cache; the sum is the one of Megatron's hook.
            scratch = fc1.new_empty(2 * max(widths) * fc1.shape[1], dtype=dtype)
            weight_grad = functools.partial(_added, scratch, fc1.dtype)
        by_rows = (t.split(rows) for t in (x_RH, probs_R, dy_RH, dx_RH, dprobs_R))
        by_widths = (*(fc1_pieces(t, widths) for t in (fc1, dfc1)), *(fc2_pieces(t, widths) for t in (fc2, dfc2)))
        for x, probs, dy, dx, dprobs, w1, dw1, w2, dw2, gate_up in zip(*by_rows, *by_widths, gate_ups, strict=True):
            dy, scale = dy.to(dtype), probs.to(dtype).unsqueeze(-1)
            gate, up = gate_up.chunk(2, dim=-1)
            silu_gate = torch.nn.functional.silu(gate)
            swiglu = silu_gate * up
            weight_grad(dy.t(), swiglu * scale, dw2)
            dhidden = dy @ w2.to(dtype)
            dprobs.copy_((dhidden * swiglu).sum(dim=-1))
            dswiglu = dhidden * scale
            dgate = torch.ops.aten.silu_backward(dswiglu * up, gate)
            dgate_up = torch.cat((dgate, dswiglu * silu_gate), dim=-1)
            weight_grad(dgate_up.t(), x.to(dtype), dw1)
            _written(dgate_up, w1.to(dtype), dx)
        if ctx.main_grads:
            dfc1, dfc2 = map(added, ctx.weights)
        return dx_RH, dprobs_R, None, dfc1, dfc2, None


def _added(scratch, dtype, a, b, out):
    """out += a @ b, rounded to ``dtype`` in between."""
    product = scratch[: out.numel()].view(out.shape)
    torch.mm(a, b, out=product)
    out.add_(product.to(dtype))


def _written(a, b, out):
    """out = a @ b, straight into it where the dtypes agree."""
    if out.dtype == a.dtype:
        torch.mm(a, b, out=out)
    else:
        out.copy_(a @ b)
