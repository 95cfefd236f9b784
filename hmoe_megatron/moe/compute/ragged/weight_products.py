"""Weight gradients: products over the rows of a piece, written or added to what is there. Device code."""

import triton
import triton.language as tl

from hmoe_megatron.moe.compute.ragged.blocks import (
    INLINE_PTX,
    VECTOR,
    halves,
    hidden_start,
    inside,
    prefetch,
    row_start,
    tile_at,
    tile_count,
    tiles_before,
    tiles_of,
)

LINE = tl.constexpr(32)  # fp32 numbers in a line of the cache


@triton.jit
def _operands(
    A,
    D,
    h0,
    row,
    i0,
    n0,
    width,
    m,
    k,
    H,
    stride_d,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    EVEN_F: tl.constexpr,
    EVEN_H: tl.constexpr,
):
    """[BM, BK] of A [m, width] transposed and [BK, BN] of D [m, H], from row k of the piece on."""
    i = i0 + tl.arange(0, BM)
    n = n0 + tl.arange(0, BN)
    ik = tl.arange(0, BK)
    if not EVEN_F:
        i = inside(i, width)
    if not EVEN_H:
        n = inside(n, H)
    a = A + h0 + tl.cast(k, tl.int64) * width + (ik[None, :] * width + i[:, None])
    d = D + (row + k).to(tl.int64) * stride_d + (ik[:, None] * stride_d + n[None, :])
    return tl.load(a, mask=(ik < m - k)[None, :], other=0.0), tl.load(d, mask=(ik < m - k)[:, None], other=0.0)


@triton.jit
def _places(i, n, F, H, TRANSPOSED: tl.constexpr):
    """Offsets of the elements (i, n) of a piece's gradient, which has rows of H, or (TRANSPOSED) columns of F."""
    if TRANSPOSED:
        return i + n * F
    else:
        return i * H + n


@triton.jit
def _store_part(
    v, DW, i0, n0, width, F, H, TRANSPOSED: tl.constexpr, ACCUMULATE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr
):
    i = i0 + tl.arange(0, BM)
    n = n0 + tl.arange(0, BN)
    mask = (i < width)[:, None] & (n < H)[None, :]
    dw = DW + _places(i[:, None], n[None, :], F, H, TRANSPOSED)
    if ACCUMULATE:
        v += tl.load(dw, mask=mask, other=0.0).to(tl.float32)
    tl.store(dw, v.to(DW.dtype.element_ty), mask=mask)


@triton.jit
def _store(
    acc, DW, i0, n0, width, F, H, TRANSPOSED: tl.constexpr, ACCUMULATE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr
):
    """In parts of at most 64 columns where they are added to: what is there needs registers too."""
    if ACCUMULATE and BN > 64:
        left, right = halves(acc, BM, BN)
        _store(left, DW, i0, n0, width, F, H, TRANSPOSED, ACCUMULATE, BM, BN // 2)
        _store(right, DW, i0, n0 + BN // 2, width, F, H, TRANSPOSED, ACCUMULATE, BM, BN // 2)
    else:
        _store_part(acc, DW, i0, n0, width, F, H, TRANSPOSED, ACCUMULATE, BM, BN)


@triton.jit
def _prefetch(DW, i0, n0, width, F, H, TRANSPOSED: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    """What a tile is added to, into the L2 cache while its product is computed."""
    if INLINE_PTX:
        line = tl.arange(0, BM * BN // LINE)
        if TRANSPOSED:
            i = i0 + line % (BM // LINE) * LINE
            n = n0 + line // (BM // LINE)
        else:
            i = i0 + line // (BN // LINE)
            n = n0 + line % (BN // LINE) * LINE
        prefetch((DW + _places(tl.minimum(i, width - 1), tl.minimum(n, H - 1), F, H, TRANSPOSED)).to(tl.int64))


@triton.jit(do_not_specialize=["E", "tiles_at"])
def weight_grad(
    A,
    D,
    DW,
    layer,
    batch,
    E,
    tiles_at,
    H,
    stride_d,
    KIND: tl.constexpr,
    TIMES: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    FLAT: tl.constexpr,
    EP2: tl.constexpr,
    PROGRAMS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    EVEN_F: tl.constexpr,
    EVEN_H: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dW1 [2 F, H] = [dg | du]^T x (TIMES 2), or dW2 [H, F] = (h^T dy)^T (TIMES 1, TRANSPOSED): A by width, D by H.

    A piece without rows gets zeros, by one step that reads nothing. With ACCUMULATE it has no tile.
    """
    pid = tl.program_id(0)
    if FLAT:
        j = tl.arange(0, EP2)
        there = j < E
        m_E = tl.load(batch + j + 1, mask=there, other=0) - tl.load(batch + j, mask=there, other=0)
        before_E = tiles_before(batch, j, E, KIND, there)
        of_E = tiles_of(batch, j, E, KIND, there)
        # Tiles of a piece that are this program's, times their steps.
        mine_E = (before_E + of_E + PROGRAMS - 1 - pid) // PROGRAMS - (before_E + PROGRAMS - 1 - pid) // PROGRAMS
        steps = tl.sum(mine_E * tl.maximum((m_E.to(tl.int32) + BK - 1) // BK, 1), axis=0)
        acc = tl.zeros((BM, BN), dtype=tl.float32)
        STEPS = 0
        step = -1
        tile = pid - PROGRAMS
        row_tile = 0
        column_tile = 0
        row = 0
        m = 0
        width = 1
        start = 0
        h = tl.load(batch)
        for _ in range(steps):
            step = tl.where(step == STEPS - 1, 0, step + 1)
            if step == 0:
                tile += PROGRAMS
                e, row_tile, column_tile = tile_at(batch + tiles_at, tile)
                row = row_start(batch, e)
                m = row_start(batch, e + 1) - row
                width = tl.load(layer + e) // VECTOR
                start = tl.load(layer + E + e) // VECTOR
                h = hidden_start(batch, e, E) // VECTOR
                STEPS = tl.maximum((m + BK - 1) // BK, 1)
                if ACCUMULATE:
                    F = width * VECTOR
                    dw = DW + (start * (VECTOR * TIMES)).to(tl.int64) * H
                    _prefetch(dw, row_tile * BM, column_tile * BN, TIMES * F, F, H, TRANSPOSED, BM, BN)
            F = width * VECTOR
            a, d = _operands(
                A,
                D,
                h * (VECTOR * TIMES),
                row,
                row_tile * BM,
                column_tile * BN,
                TIMES * F,
                m,
                step * BK,
                H,
                stride_d,
                BM,
                BN,
                BK,
                EVEN_F,
                EVEN_H,
            )
            acc = tl.dot(a, d, acc, input_precision=PRECISION)
            if step == STEPS - 1:
                dw = DW + (start * (VECTOR * TIMES)).to(tl.int64) * H
                _store(acc, dw, row_tile * BM, column_tile * BN, TIMES * F, F, H, TRANSPOSED, ACCUMULATE, BM, BN)
                acc = tl.zeros((BM, BN), dtype=tl.float32)
    else:
        for tile in range(pid, tile_count(batch, E, KIND), PROGRAMS):
            e, row_tile, column_tile = tile_at(batch + tiles_at, tile)
            row = row_start(batch, e)
            m = row_start(batch, e + 1) - row
            F = tl.multiple_of(tl.load(layer + e), VECTOR)
            h0 = hidden_start(batch, e, E) * TIMES
            dw = DW + (tl.multiple_of(tl.load(layer + E + e), VECTOR) * TIMES).to(tl.int64) * H
            if ACCUMULATE:
                _prefetch(dw, row_tile * BM, column_tile * BN, TIMES * F, F, H, TRANSPOSED, BM, BN)
            acc = tl.zeros((BM, BN), dtype=tl.float32)
            for k in range(0, m, BK):
                a, d = _operands(
                    A,
                    D,
                    h0,
                    row,
                    row_tile * BM,
                    column_tile * BN,
                    TIMES * F,
                    m,
                    k,
                    H,
                    stride_d,
                    BM,
                    BN,
                    BK,
                    EVEN_F,
                    EVEN_H,
                )
                acc = tl.dot(a, d, acc, input_precision=PRECISION)
            _store(acc, dw, row_tile * BM, column_tile * BN, TIMES * F, F, H, TRANSPOSED, ACCUMULATE, BM, BN)
