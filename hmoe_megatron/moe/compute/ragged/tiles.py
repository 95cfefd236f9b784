"""Which layers the kernels take, and with which tiles. Each class of TILES says where its figures come from.

A product is cut into tiles of ``rows`` x ``columns`` that a program computes in steps of ``depth``.
"""

import functools
from dataclasses import dataclass

import torch

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
VECTOR = 8  # widths are a multiple: of numbers of 2 bytes an access of 16
HIDDEN_VECTOR = 16  # the hidden size is a multiple: Triton knows of an integer whether 16 divides it, and no more
MOST_PIECES = 1 << 16
MOST_ELEMENTS = 1 << 31  # of a piece's fc1: places in it are 32-bit

FEW_ROWS = 256  # mean rows of a piece below which the weight gradients, whose depth they are, take other tiles
LARGE_SHARED_MEMORY_BYTES = 200 << 10  # H100, H200, B200 have 227 KiB a program; A100 163, consumer GPUs 99


@dataclass(frozen=True)
class Tile:
    """``programs``: a multiprocessor. ``flat``: one loop over the steps of all tiles of a program, so that the next
    tile's first operands arrive while this one is stored; else a loop over tiles, and in it one over steps."""

    rows: int
    columns: int
    depth: int = 64
    warps: int = 8
    stages: int = 3
    programs: int = 1
    flat: bool = False


@dataclass(frozen=True)
class Tiles:
    """One a product. ``activation``: columns that a program of the activation's gradient takes at once."""

    up: Tile
    down: Tile
    hidden_grad: Tile
    input_grad: Tile
    fc1_grad: Tile
    fc2_grad: Tile
    activation: int = 1024


_SQUARE = Tile(128, 128, warps=4, programs=2, flat=True)
_WIDE = Tile(128, 256)
_WIDE4 = Tile(128, 256, stages=4)
_UP4 = Tile(128, 256, stages=4, flat=True)
_SMALL = Tile(128, 128)
_FP32 = Tile(64, 64, depth=32, warps=4)

TILES = {
    # Measured on an H100, bf16 (docs/gpu.md): best or within 3 % of it in all shapes of at least 768 mean rows.
    "large": Tiles(up=_UP4, down=_WIDE4, hidden_grad=_WIDE4, input_grad=_WIDE4, fc1_grad=_WIDE, fc2_grad=_WIDE),
    # Measured likewise at 128 mean rows: weight gradients have two steps in depth there.
    "large, few rows": Tiles(
        up=_UP4, down=_WIDE4, hidden_grad=_WIDE4, input_grad=_WIDE4, fc1_grad=_SQUARE, fc2_grad=_SQUARE
    ),
    # Compiled for sm_80 without spills, not measured: what fits the shared memory of an A100 and of consumer GPUs.
    "small": Tiles(
        up=Tile(128, 128, flat=True),
        down=_SMALL,
        hidden_grad=_SMALL,
        input_grad=_SMALL,
        fc1_grad=_SMALL,
        fc2_grad=_SMALL,
    ),
    # fp32 has no tensor cores here; for parity, not for speed. Compiled, not measured.
    "fp32": Tiles(up=_FP32, down=_FP32, hidden_grad=_FP32, input_grad=_FP32, fc1_grad=_FP32, fc2_grad=_FP32),
}


def tile_class(dtype: torch.dtype, shared_memory_bytes: int, mean_rows: float) -> str:
    """Key of TILES for operands of ``dtype``, the shared memory that a program may have, and mean rows of a piece."""
    if dtype == torch.float32:
        return "fp32"
    if shared_memory_bytes < LARGE_SHARED_MEMORY_BYTES:
        return "small"
    return "large, few rows" if mean_rows < FEW_ROWS else "large"


@functools.cache
def unsupported(widths: tuple[int, ...], hidden: int, dtype: torch.dtype) -> str:
    """What of a layer the kernels can't take; "" if nothing."""
    if dtype not in DTYPES:
        return f"{dtype}"
    if odd := [width for width in widths if width % VECTOR]:
        return f"width {odd[0]}, which is not a multiple of {VECTOR}"
    if hidden % HIDDEN_VECTOR:
        return f"hidden size {hidden}, which is not a multiple of {HIDDEN_VECTOR}"
    if len(widths) >= MOST_PIECES or 2 * max(widths) * hidden >= MOST_ELEMENTS:
        return f"{len(widths)} pieces of up to {max(widths)} x {hidden}"
    return ""
