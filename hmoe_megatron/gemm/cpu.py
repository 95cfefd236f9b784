"""CPU backend: one autograd node for all pieces of a layer, writing straight into the result.

bf16 and fp16 are computed in fp32, one piece at a time: CPUs without such units multiply bf16 several times slower than
fp32. Against the reference it saves the concatenation, the graph of small nodes, and the stored activation products.
"""

import torch


def cpu_experts(x_RH, probs_R, rows, fc1_weights, fc2_weights, config, tp_group):
    """See ExpertCompute. In fp32 bitwise equal to the reference: same products in the same order."""
    return _CpuExperts.apply(x_RH, probs_R, rows, *fc1_weights, *fc2_weights)


def _compute_dtype(x):
    return torch.float32 if x.dtype in (torch.bfloat16, torch.float16) else x.dtype


def _swiglu(gate_up_RF):
    gate, up = gate_up_RF.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate) * up


class _CpuExperts(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_RH, probs_R, rows, *weights):
        dtype = _compute_dtype(x_RH)
        pieces = len(rows)
        y_RH = x_RH.new_empty(x_RH.shape)
        gate_ups = []
        for x, probs, y, fc1, fc2 in zip(
            x_RH.split(rows), probs_R.split(rows), y_RH.split(rows), weights[:pieces], weights[pieces:], strict=True
        ):
            gate_up = x.to(dtype) @ fc1.to(dtype).t()
            gate_ups.append(gate_up)
            y.copy_((_swiglu(gate_up) * probs.to(dtype).unsqueeze(-1)) @ fc2.to(dtype).t())
        ctx.rows = rows
        ctx.save_for_backward(x_RH, probs_R, *weights, *gate_ups)
        return y_RH

    @staticmethod
    def backward(ctx, dy_RH):
        x_RH, probs_R, *saved = ctx.saved_tensors
        rows, pieces = ctx.rows, len(ctx.rows)
        fc1s, fc2s, gate_ups = saved[:pieces], saved[pieces : 2 * pieces], saved[2 * pieces :]
        dtype = _compute_dtype(x_RH)
        dx_RH, dprobs_R = torch.empty_like(x_RH), torch.empty_like(probs_R)
        dfc1s, dfc2s = [], []
        parts = (t.split(rows) for t in (x_RH, probs_R, dy_RH, dx_RH, dprobs_R))
        for x, probs, dy, dx, dprobs, fc1, fc2, gate_up in zip(*parts, fc1s, fc2s, gate_ups, strict=True):
            dy, scale = dy.to(dtype), probs.to(dtype).unsqueeze(-1)
            gate, up = gate_up.chunk(2, dim=-1)
            silu_gate = torch.nn.functional.silu(gate)
            swiglu = silu_gate * up
            dfc2s.append((dy.t() @ (swiglu * scale)).to(fc2.dtype))
            dhidden = dy @ fc2.to(dtype)
            dprobs.copy_((dhidden * swiglu).sum(dim=-1))
            dswiglu = dhidden * scale
            dgate = torch.ops.aten.silu_backward(dswiglu * up, gate)
            dgate_up = torch.cat((dgate, dswiglu * silu_gate), dim=-1)
            dfc1s.append((dgate_up.t() @ x.to(dtype)).to(fc1.dtype))
            dx.copy_(dgate_up @ fc1.to(dtype))
        return dx_RH, dprobs_R, None, *dfc1s, *dfc2s
