"""Which program computes which tile: decided on the device in one launch, from the rows of the pieces.

A batch's schedule is one int64 tensor (E pieces, 7 kinds of work):

    row_start[E + 1]        first row of each piece, then all rows
    hidden_start[E + 1]     rows x width of the pieces before it, then of all
    count[7]                tiles of each kind
    before[7, E], of[7, E]  tiles of each kind before those of a piece, and its own
    tiles                   of each kind in turn: piece | row of tiles << 16 | column of tiles << 40

Programs take tiles p, p + P, p + 2 P, ... of a list. Products of equal cost a tile list the widest piece first, weight
gradients the piece with the most rows: the longest work begins first, and pieces next to each other share operands.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from hmoe_megatron.moe.compute.ragged.blocks import KINDS
from hmoe_megatron.moe.compute.ragged.tiles import Tiles

UP, DOWN, HIDDEN_GRAD, ACTIVATION, INPUT_GRAD, FC1_GRAD, FC2_GRAD = range(7)
GROUP = 8  # rows of tiles that are walked together, column by column: they share operands in the L2 cache
FIELDS = tl.constexpr(10)  # of a kind, below


@triton.jit(do_not_specialize=["R", "E", "skip_empty"])
def _schedule(rows, layer, batch, R, E, skip_empty, GROUP: tl.constexpr, EP2: tl.constexpr, BLOCK: tl.constexpr):
    """Program (kind, piece) writes the tiles of this piece for this kind."""
    kind = tl.program_id(0)
    e = tl.program_id(1)
    j = tl.arange(0, EP2)
    there = j < E
    m_E = tl.load(rows + j, mask=there, other=0).to(tl.int32)
    F_E = tl.load(layer + j, mask=there, other=0)
    m = tl.load(rows + e).to(tl.int32)
    F = tl.load(layer + e)
    fields = layer + 2 * E + kind * FIELDS
    per_row = tl.load(fields)
    rows_F = tl.load(fields + 1)
    BM = tl.load(fields + 2)
    columns_F = tl.load(fields + 3)
    columns = tl.load(fields + 4)
    BN = tl.load(fields + 5)
    most_rows_first = tl.load(fields + 6)
    of_weights = tl.load(fields + 7)

    counted = there & ((m_E > 0) | ((of_weights == 1) & (skip_empty == 0)))
    tiles_E = ((per_row * m_E + rows_F * F_E + BM - 1) // BM) * ((columns_F * F_E + columns + BN - 1) // BN)
    tiles_E = tl.where(counted, tiles_E, 0)
    if most_rows_first == 1:
        earlier = (m_E > m) | ((m_E == m) & (j < e))
    else:
        earlier = (F_E > F) | ((F_E == F) & (j < e))
    before = tl.sum(tl.where(earlier & there, tiles_E, 0), axis=0)
    mine = tl.sum(tl.where(j == e, tiles_E, 0), axis=0)
    heads = batch + 2 * (E + 1)
    tl.store(heads + KINDS + kind * E + e, before.to(tl.int64))
    tl.store(heads + KINDS + (KINDS + kind) * E + e, mine.to(tl.int64))
    if e == 0:
        tl.store(heads + kind, tl.sum(tiles_E, axis=0).to(tl.int64))
    if kind == 0:
        elements_E = m_E.to(tl.int64) * F_E.to(tl.int64)
        tl.store(batch + e, tl.sum(tl.where(j < e, m_E, 0), axis=0).to(tl.int64))
        tl.store(batch + E + 1 + e, tl.sum(tl.where(j < e, elements_E, 0), axis=0))
        if e == E - 1:
            tl.store(batch + E, tl.sum(m_E, axis=0).to(tl.int64))
            tl.store(batch + 2 * E + 1, tl.sum(elements_E, axis=0))

    k = tl.arange(0, 8)
    most = tl.load(layer + 2 * E + k * FIELDS + 8, mask=k < kind, other=0)
    more = tl.load(layer + 2 * E + k * FIELDS + 9, mask=k < kind, other=0)
    block = tl.load(layer + 2 * E + k * FIELDS + 2, mask=k < kind, other=1)
    first = tl.sum((R // block).to(tl.int64) * most + more, axis=0)
    tiles = heads + KINDS + 2 * KINDS * E + first
    row_tiles = (per_row * m + rows_F * F + BM - 1) // BM
    column_tiles = (columns_F * F + columns + BN - 1) // BN
    for start in range(0, mine, BLOCK):
        t = start + tl.arange(0, BLOCK)
        top = t // (GROUP * column_tiles) * GROUP
        height = tl.maximum(tl.minimum(row_tiles - top, GROUP), 1)
        place = t % (GROUP * column_tiles)
        row = (top + place % height).to(tl.int64)
        column = (place // height).to(tl.int64)
        tl.store(tiles + before + t, e.to(tl.int64) | (row << 16) | (column << 40), mask=t < mine)


@dataclass(frozen=True)
class Kind:
    """Extents of a kind of work: rows = per_row m + rows_F F, columns = columns_F F + columns; tiles of BM x BN."""

    per_row: int
    rows_F: int
    BM: int
    columns_F: int
    columns: int
    BN: int
    most_rows_first: bool = False
    of_weights: bool = False

    def most_tiles(self, widths) -> tuple[int, int]:
        """(a, b): at most R // BM * a + b tiles with R rows, however they are spread over the pieces."""
        columns = [-(-(self.columns_F * width + self.columns) // self.BN) for width in widths]
        if self.per_row:
            return max(columns), sum(columns)
        rows = [-(-self.rows_F * width // self.BM) for width in widths]
        return 0, sum(row * column for row, column in zip(rows, columns, strict=True))

    def fields(self, widths) -> list[int]:
        """What the kernel reads of it."""
        return [
            self.per_row,
            self.rows_F,
            self.BM,
            self.columns_F,
            self.columns,
            self.BN,
            int(self.most_rows_first),
            int(self.of_weights),
            *self.most_tiles(widths),
        ]


def kinds_of(hidden: int, tiles: Tiles) -> list[Kind]:
    """Of UP, DOWN, ... in their order."""
    down, to_input = tiles.down, tiles.input_grad
    fc1, fc2 = tiles.fc1_grad, tiles.fc2_grad
    return [
        Kind(1, 0, tiles.up.rows, 1, 0, tiles.up.columns // 2),  # gate columns, and the same up columns beside them
        Kind(1, 0, down.rows, 0, hidden, down.columns),
        Kind(1, 0, tiles.hidden_grad.rows, 1, 0, tiles.hidden_grad.columns),
        Kind(1, 0, 1, 0, 1, 1),
        Kind(1, 0, to_input.rows, 0, hidden, to_input.columns),
        Kind(0, 2, fc1.rows, 0, hidden, fc1.columns, most_rows_first=True, of_weights=True),
        Kind(0, 1, fc2.rows, 0, hidden, fc2.columns, most_rows_first=True, of_weights=True),
    ]


class Layer:
    """The static part of a layer's schedule: widths of the pieces, and extents of every kind of work, on the device."""

    def __init__(self, widths, hidden: int, tiles: Tiles, device):
        self.widths, self.hidden, self.tiles, self.device = tuple(widths), hidden, tiles, device
        self.pieces = len(self.widths)
        self.kinds = kinds_of(hidden, tiles)
        self.bounds = [kind.most_tiles(self.widths) for kind in self.kinds]
        starts = [sum(self.widths[:e]) for e in range(self.pieces)]
        fields = [field for kind in self.kinds for field in kind.fields(self.widths)]
        self.table = torch.tensor([*self.widths, *starts, *fields], dtype=torch.int32, device=device)
        # One compiled schedule for all layers of up to 64 pieces.
        self.pieces_power_of_2 = max(64, triton.next_power_of_2(self.pieces))

    def divides(self, block: int, times: int = 1) -> bool:
        """Whether ``block`` divides ``times`` every width."""
        return not any(times * width % block for width in self.widths)

    def batch(self, rows_E: torch.Tensor, rows: int, skip_empty: bool) -> "Batch":
        """Schedule of a batch. rows_E: integers on the device, sum ``rows``. skip_empty: no tiles of weight gradients
        for pieces without rows, where they are added to what is there."""
        first, places = 2 * (self.pieces + 1) + len(self.kinds) * (1 + 2 * self.pieces), []
        for kind, (most, more) in zip(self.kinds, self.bounds, strict=True):
            places.append(first)
            first += rows // kind.BM * most + more
        batch = torch.empty(first, dtype=torch.int64, device=self.device)
        _schedule[(len(self.kinds), self.pieces)](
            rows_E,
            self.table,
            batch,
            rows,
            self.pieces,
            int(skip_empty),
            GROUP=GROUP,
            EP2=self.pieces_power_of_2,
            BLOCK=256,
            num_warps=4,
        )
        return Batch(batch, rows, places)


@dataclass(frozen=True)
class Batch:
    """tensor: see the module. places: where the tiles of each kind begin in it."""

    tensor: torch.Tensor
    rows: int
    places: list[int]
