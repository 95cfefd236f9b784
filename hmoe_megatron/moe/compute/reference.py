"""Reference backend: one linear layer after the other; what every other backend is held to."""

import torch
from torch.nn.functional import linear, silu

from hmoe_megatron.moe.compute.flat import fc1_pieces, fc2_pieces


def reference_experts(x_RH, probs_R, rows, fc1, fc2, widths, clamp: float | None = None, offset: float = 0.0):
    """See ExpertCompute. Without fused SwiGLU bitwise equal to Megatron's SequentialMLP where the widths are equal.

    clamp, offset: of Megatron's --activation-func-clamp-value and --glu-linear-offset, y = W2 (p * silu(g) * (u +
    offset)) with g at most clamp and u from -clamp to clamp.
    """
    weights = zip(fc1_pieces(fc1, widths), fc2_pieces(fc2, widths), strict=True)
    outputs = [
        _expert(x, probs, w1, w2, clamp, offset)
        for x, probs, (w1, w2) in zip(x_RH.split(rows), probs_R.split(rows), weights, strict=True)
    ]
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def _expert(x, probs, w1, w2, clamp, offset):
    gate, up = linear(x, w1).chunk(2, dim=-1)
    if clamp is not None:
        gate, up = gate.clamp(max=clamp), up.clamp(min=-clamp, max=clamp)
    if offset:
        up = up + offset
    # Not Megatron's fused SwiGLU: torch.compile would compile it anew for another number of rows, and at 64 experts its
    # guards take longer than it saves (docs/gpu.md).
    return linear((silu(gate) * up * probs.unsqueeze(-1)).to(x.dtype), w2)
