"""Gradient of SwiGLU and of the probability, by element. Device code."""

import triton
import triton.language as tl

from hmoe_megatron.moe.compute.ragged.blocks import VECTOR, hidden_start, row_start, sigmoid, tile_at, tile_count


@triton.jit(do_not_specialize=["E", "tiles_at"])
def activation_grad(
    DH,
    P,
    GU,
    DGU,
    HIDDEN,
    DP,
    layer,
    batch,
    E,
    tiles_at,
    KIND: tl.constexpr,
    WRITE_HIDDEN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Of one row: [dg | du] from dh and [g | u], dp, and with WRITE_HIDDEN h again. The sum over the width is this
    program's alone, so that it is the same in every run.

    DGU may be GU and HIDDEN may be DH: this program alone reads an element and writes it afterwards.
    """
    dtype: tl.constexpr = DGU.dtype.element_ty
    index = tl.program_id(0)
    if index < tile_count(batch, E, KIND):
        e, r, _ = tile_at(batch + tiles_at, index)
        row = row_start(batch, e) + r
        F = tl.multiple_of(tl.load(layer + e), VECTOR)
        h0 = hidden_start(batch, e, E) + r.to(tl.int64) * F
        p = tl.load(P + row).to(tl.float32)
        i = tl.arange(0, BLOCK)
        dp = tl.zeros((BLOCK,), dtype=tl.float32)
        for f in range(0, F, BLOCK):
            mask = i < F - f
            h = h0 + f + i
            g = 2 * h0 + f + i
            dh = tl.load(DH + h, mask=mask, other=0.0).to(tl.float32)
            gate = tl.load(GU + g, mask=mask, other=0.0).to(tl.float32)
            up = tl.load(GU + g + F, mask=mask, other=0.0).to(tl.float32)
            s = sigmoid(gate)
            silu = gate * s
            dp += dh * silu * up
            dh *= p
            tl.store(DGU + g, (dh * up * (s + silu * (1.0 - s))).to(dtype), mask=mask)
            tl.store(DGU + g + F, (dh * silu).to(dtype), mask=mask)
            if WRITE_HIDDEN:
                tl.store(HIDDEN + h, (silu * up * p).to(dtype), mask=mask)
        tl.store(DP + row, tl.sum(dp, axis=0).to(DP.dtype.element_ty))
