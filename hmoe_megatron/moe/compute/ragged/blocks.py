"""What the kernels share: where a tile lies, SiLU's sigmoid, edges of a tile. Device code."""

import os

import triton
import triton.language as tl

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"
INLINE_PTX = tl.constexpr(not INTERPRETED)  # the interpreter has none

VECTOR = tl.constexpr(8)  # every width is a multiple: rows of h then begin at 16 bytes
KINDS = tl.constexpr(7)  # of work, in a schedule (see schedule.py)


@triton.jit
def row_start(batch, e):
    """First row of piece e."""
    return tl.load(batch + e).to(tl.int32)


@triton.jit
def hidden_start(batch, e, E):
    """Elements of h before piece e: sum of rows x width of the pieces before it. Of [g | u] it is twice that."""
    return tl.multiple_of(tl.load(batch + E + 1 + e), VECTOR)


@triton.jit
def tile_count(batch, E, KIND: tl.constexpr):
    """Tiles of a product over all pieces."""
    return tl.load(batch + 2 * (E + 1) + KIND).to(tl.int32)


@triton.jit
def tiles_before(batch, e, E, KIND: tl.constexpr, there):
    """Tiles of a product that are listed before those of the pieces e, as far as these are ``there``."""
    return tl.load(batch + 2 * (E + 1) + KINDS + KIND * E + e, mask=there, other=0).to(tl.int32)


@triton.jit
def tiles_of(batch, e, E, KIND: tl.constexpr, there):
    """Tiles of a product that the pieces e have."""
    return tl.load(batch + 2 * (E + 1) + KINDS + (KINDS + KIND) * E + e, mask=there, other=0).to(tl.int32)


@triton.jit
def tile_at(tiles, index):
    """(piece, row of tiles, column of tiles)."""
    packed = tl.load(tiles + index)
    return (packed & 65535).to(tl.int32), ((packed >> 16) & 16777215).to(tl.int32), (packed >> 40).to(tl.int32)


@triton.jit
def sigmoid(x):
    if INLINE_PTX:  # 4 instructions for the 14 of tl.sigmoid, which also serves denormals
        t = tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x * -1.4426950408889634], dtype=tl.float32, is_pure=True, pack=1
        )
        return tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [t + 1.0], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return tl.sigmoid(x)


@triton.jit
def halves(x, BM: tl.constexpr, BN: tl.constexpr):
    """[BM, BN] -> its left and its right columns, in registers."""
    return tl.split(tl.permute(tl.reshape(x, (BM, 2, BN // 2)), (0, 2, 1)))


@triton.jit
def inside(index, n):
    """Indices past n, a multiple of 8, moved into its last group of 8: reads stay in bounds and 16 bytes wide."""
    return tl.max_contiguous(tl.multiple_of(tl.minimum(index // 8, n // 8 - 1) * 8 + index % 8, 8), 8)


@triton.jit
def prefetch(pointers):
    """Bring a cache line of each pointer, int64, into the L2 cache; waits for nothing."""
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [pointers], dtype=tl.int32, is_pure=False, pack=1
    )
