"""Products that give a row of output for a row of input: up, down, hidden grad, input grad. Device code.

Rows past a piece's last are read again from it and not stored; columns past the width, or past H, likewise. Offsets
that may pass 2^31 elements are int64, those inside a tile's block of rows int32.
"""

import triton
import triton.language as tl

from hmoe_megatron.moe.compute.ragged.blocks import (
    VECTOR,
    halves,
    hidden_start,
    inside,
    row_start,
    sigmoid,
    tile_at,
    tile_count,
)

# "x // VECTOR * VECTOR" keeps what is known of divisibility through a loop or an if: without it no 16-byte loads, and
# so no asynchronous copies.


@triton.jit
def _up_operands(
    X,
    W1,
    start,
    r0,
    left,
    n0,
    F,
    k,
    H,
    stride_x,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    EVEN_H: tl.constexpr,
    EVEN_F: tl.constexpr,
):
    """[BM, BK] of x and [BK, BN] of W1 transposed: BN / 2 gate rows of it, and the same up rows beside them."""
    HALF: tl.constexpr = BN // 2
    im = tl.arange(0, BM)
    ib = tl.arange(0, BN)
    ik = tl.arange(0, BK)
    column = ib % HALF
    if not EVEN_F:
        column = tl.minimum(column, F - n0 - 1)
    a = X + r0.to(tl.int64) * stride_x + k + (tl.minimum(im, left - 1)[:, None] * stride_x + ik[None, :])
    w = W1 + start * 2 * H + k
    b = w + (((ib // HALF) * F + n0 + column)[None, :] * H + ik[:, None])
    if EVEN_H:
        return tl.load(a), tl.load(b)
    else:
        return tl.load(a, mask=(ik < H - k)[None, :], other=0.0), tl.load(b, mask=(ik < H - k)[:, None], other=0.0)


@triton.jit
def _up_store(
    acc,
    P,
    GU,
    HIDDEN,
    h0,
    row,
    r0,
    left,
    n0,
    F,
    WRITE_GU: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    EVEN_F: tl.constexpr,
):
    HALF: tl.constexpr = BN // 2
    dtype: tl.constexpr = HIDDEN.dtype.element_ty
    gate, up = halves(acc, BM, BN)
    im = tl.arange(0, BM)
    ih = tl.arange(0, HALF)
    mask = (im < left)[:, None]
    if not EVEN_F:
        mask = mask & (ih < F - n0)[None, :]
    h = h0 + r0.to(tl.int64) * F
    if WRITE_GU:
        gu = GU + (2 * h + n0) + (im[:, None] * (2 * F) + ih[None, :])
        tl.store(gu, gate.to(dtype), mask=mask)
        tl.store(gu + F, up.to(dtype), mask=mask)
    p = tl.load(P + row + im, mask=im < left, other=0.0).to(tl.float32)
    hidden = gate * sigmoid(gate) * up * p[:, None]
    tl.store(HIDDEN + (h + n0) + (im[:, None] * F + ih[None, :]), hidden.to(dtype), mask=mask)


@triton.jit(do_not_specialize=["E", "tiles_at"])
def up(
    X,
    P,
    W1,
    GU,
    HIDDEN,
    layer,
    batch,
    E,
    tiles_at,
    H,
    stride_x,
    KIND: tl.constexpr,
    WRITE_GU: tl.constexpr,
    PROGRAMS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    EVEN_H: tl.constexpr,
    EVEN_F: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """h and, with WRITE_GU, [g | u]. One loop over the steps of all tiles of this program (see tiles.Tile.flat): only
    scalars live from step to step, what is made of them is made anew."""
    pid = tl.program_id(0)
    STEPS = tl.cdiv(H, BK)
    acc = tl.zeros((BM, BN), dtype=tl.float32)
    step = -1
    tile = pid - PROGRAMS
    row = 0
    r0 = 0
    left = 1
    column = 0
    width = 1
    start = 0
    e = 0
    for _ in range((tile_count(batch, E, KIND) + PROGRAMS - 1 - pid) // PROGRAMS * STEPS):
        step = tl.where(step == STEPS - 1, 0, step + 1)
        if step == 0:
            tile += PROGRAMS
            e, row_tile, column = tile_at(batch + tiles_at, tile)
            r0 = row_tile * BM
            row = row_start(batch, e) + r0
            left = row_start(batch, e + 1) - row
            width = tl.load(layer + e) // VECTOR
            start = tl.load(layer + E + e) // VECTOR
        F = width * VECTOR
        n0 = column * (BN // 2)
        a, b = _up_operands(
            X, W1, (start * VECTOR).to(tl.int64), row, left, n0, F, step * BK, H, stride_x, BM, BN, BK, EVEN_H, EVEN_F
        )
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
        if step == STEPS - 1:
            h0 = hidden_start(batch, e, E)
            _up_store(acc, P, GU, HIDDEN, h0, row, r0, left, n0, F, WRITE_GU, BM, BN, EVEN_F)
            acc = tl.zeros((BM, BN), dtype=tl.float32)


@triton.jit
def _store_rows(acc, out, first, stride, left, n0, N, BM: tl.constexpr, BN: tl.constexpr, EVEN_N: tl.constexpr):
    """[BM, BN] to columns n0 on of the rows from element ``first`` on."""
    im = tl.arange(0, BM)
    i = tl.arange(0, BN)
    mask = (im < left)[:, None]
    if not EVEN_N:
        mask = mask & (i < N - n0)[None, :]
    tl.store(out + (first + n0) + (im[:, None] * stride + i[None, :]), acc.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["E", "tiles_at"])
def from_hidden(
    A,
    W,
    Y,
    layer,
    batch,
    E,
    tiles_at,
    H,
    stride_y,
    KIND: tl.constexpr,
    TIMES: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    PROGRAMS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    EVEN_K: tl.constexpr,
    EVEN_H: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Y [m, H] = A [m, K] W, K = TIMES F. Down: fc2, stored [H, K] (TRANSPOSED). Input grad: fc1, stored [K, H]."""
    im = tl.arange(0, BM)
    ik = tl.arange(0, BK)
    for tile in range(tl.program_id(0), tile_count(batch, E, KIND), PROGRAMS):
        e, row_tile, column_tile = tile_at(batch + tiles_at, tile)
        n0 = column_tile * BN
        r0 = row_tile * BM
        row = row_start(batch, e) + r0
        left = row_start(batch, e + 1) - row
        K = TIMES * tl.multiple_of(tl.load(layer + e), VECTOR)
        start = tl.multiple_of(tl.load(layer + E + e), VECTOR).to(tl.int64) * TIMES
        a = A + TIMES * hidden_start(batch, e, E) + r0.to(tl.int64) * K
        a += tl.minimum(im, left - 1)[:, None] * K + ik[None, :]
        i = n0 + tl.arange(0, BN)
        if not EVEN_H:
            i = inside(i, H)
        w = W + start * H
        acc = tl.zeros((BM, BN), dtype=tl.float32)
        for k in range(0, K, BK):
            if TRANSPOSED:
                b = w + k + (i[None, :] * K + ik[:, None])
            else:
                b = w + tl.cast(k, tl.int64) * H + (ik[:, None] * H + i[None, :])
            if EVEN_K:
                acc = tl.dot(tl.load(a + k), tl.load(b), acc, input_precision=PRECISION)
            else:
                acc = tl.dot(
                    tl.load(a + k, mask=(ik < K - k)[None, :], other=0.0),
                    tl.load(b, mask=(ik < K - k)[:, None], other=0.0),
                    acc,
                    input_precision=PRECISION,
                )
        _store_rows(acc, Y, row.to(tl.int64) * stride_y, stride_y, left, n0, H, BM, BN, EVEN_H)


@triton.jit(do_not_specialize=["E", "tiles_at"])
def hidden_grad(
    DY,
    W2,
    DH,
    layer,
    batch,
    E,
    tiles_at,
    H,
    stride_dy,
    KIND: tl.constexpr,
    PROGRAMS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    EVEN_H: tl.constexpr,
    EVEN_F: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """DH [m, F] = DY [m, H] W2, before the probability and the activation."""
    im = tl.arange(0, BM)
    ik = tl.arange(0, BK)
    for tile in range(tl.program_id(0), tile_count(batch, E, KIND), PROGRAMS):
        e, row_tile, column_tile = tile_at(batch + tiles_at, tile)
        n0 = column_tile * BN
        r0 = row_tile * BM
        row = row_start(batch, e) + r0
        left = row_start(batch, e + 1) - row
        F = tl.multiple_of(tl.load(layer + e), VECTOR)
        start = tl.multiple_of(tl.load(layer + E + e), VECTOR).to(tl.int64)
        a = DY + row.to(tl.int64) * stride_dy + (tl.minimum(im, left - 1)[:, None] * stride_dy + ik[None, :])
        i = n0 + tl.arange(0, BN)
        if not EVEN_F:
            i = inside(i, F)
        w = W2 + start * H
        acc = tl.zeros((BM, BN), dtype=tl.float32)
        for k in range(0, H, BK):
            b = w + tl.cast(k, tl.int64) * F + (ik[:, None] * F + i[None, :])
            if EVEN_H:
                acc = tl.dot(tl.load(a + k), tl.load(b), acc, input_precision=PRECISION)
            else:
                acc = tl.dot(
                    tl.load(a + k, mask=(ik < H - k)[None, :], other=0.0),
                    tl.load(b, mask=(ik < H - k)[:, None], other=0.0),
                    acc,
                    input_precision=PRECISION,
                )
        h0 = hidden_start(batch, e, E)
        _store_rows(acc, DH, h0 + r0.to(tl.int64) * F, F, left, n0, F, BM, BN, EVEN_F)
