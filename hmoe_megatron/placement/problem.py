"""One layer as the solver sees it: plain arrays. A piece of width w of expert e, on a rank of kind c, takes

    time = fixed_CE[c, e] + slope_CE[c, e] * padded(w)        bytes = piece_bytes_E[e] + width_bytes_E[e] * w

with padded(w) the next multiple of `tile`. Letters: E experts, C kinds of ranks (`ranks.kinds`, caps aside), R ranks.
held[r] = {expert: width of its piece on rank r} is a placement before its ranges are laid out.
"""

import dataclasses
import functools
from collections.abc import Sequence
from itertools import chain

import numpy as np

from hmoe_megatron.placement.cost import CostModel
from hmoe_megatron.placement.lpt import Items
from hmoe_megatron.placement.ranks import Rank, kinds


@dataclasses.dataclass(frozen=True)
class LayerProblem:
    """unit: cuts lie at its multiples; cap_R: bytes of each rank, inf without a cap."""

    widths_E: tuple[int, ...]
    tokens_E: np.ndarray
    fixed_CE: np.ndarray
    slope_CE: np.ndarray
    piece_bytes_E: np.ndarray
    width_bytes_E: np.ndarray
    kind_R: tuple[int, ...]
    speed_C: np.ndarray
    cap_R: np.ndarray
    tile: int
    unit: int
    max_cuts: int

    @classmethod
    def of(
        cls,
        tokens_E: Sequence[float],
        widths_E: Sequence[int],
        ranks: Sequence[Rank],
        cost: CostModel,
        max_cuts: int,
        unit: int,
    ) -> "LayerProblem":
        tokens, kind_R = np.asarray(tokens_E, dtype=float), kinds(ranks, caps=False)
        first = [kind_R.index(kind) for kind in range(max(kind_R) + 1)]
        speed_C = np.array([ranks[r].speed for r in first])[:, None]
        travel_C = cost.travel(ranks)[first][:, None]
        per_piece_E, per_width_E = cost.compute(tokens)
        piece_bytes_E, width_bytes_E = cost.memory(tokens)
        return cls(
            widths_E=tuple(widths_E),
            tokens_E=tokens,
            fixed_CE=per_piece_E / speed_C + tokens * travel_C,
            slope_CE=per_width_E / speed_C,
            piece_bytes_E=piece_bytes_E,
            width_bytes_E=width_bytes_E,
            kind_R=tuple(kind_R),
            speed_C=speed_C[:, 0],
            cap_R=np.array([np.inf if rank.bytes is None else rank.bytes for rank in ranks], dtype=float),
            tile=cost.width_tile,
            unit=unit,
            max_cuts=max_cuts,
        )

    def only(self, experts: Sequence[int]) -> "LayerProblem":
        """The same with these experts alone, numbered from 0."""
        return dataclasses.replace(
            self,
            widths_E=tuple(self.widths_E[e] for e in experts),
            tokens_E=self.tokens_E[experts],
            fixed_CE=self.fixed_CE[:, experts],
            slope_CE=self.slope_CE[:, experts],
            piece_bytes_E=self.piece_bytes_E[experts],
            width_bytes_E=self.width_bytes_E[experts],
        )

    def without_caps(self) -> "LayerProblem":
        return dataclasses.replace(self, cap_R=np.full(self.ranks, np.inf))

    def of_bytes(self) -> "LayerProblem":
        """The problem of evening out the bytes of whole experts."""
        return dataclasses.replace(
            self.without_caps(),
            fixed_CE=np.zeros_like(self.fixed_CE),
            max_cuts=0,
            tile=1,
            slope_CE=np.broadcast_to(self.width_bytes_E, self.slope_CE.shape),
        )

    @functools.cached_property
    def whole(self) -> list[tuple[int, int]]:
        """Every expert as one chunk: (expert, width)."""
        return list(enumerate(self.widths_E))

    @functools.cached_property
    def capped(self) -> bool:
        return bool(np.isfinite(self.cap_R).any())

    @property
    def ranks(self) -> int:
        return len(self.kind_R)

    @functools.cached_property
    def whole_CE(self) -> np.ndarray:
        """Time of each whole expert on each kind of rank."""
        return self.fixed_CE + self.slope_CE * self.padded_E

    @functools.cached_property
    def padded_E(self) -> np.ndarray:
        """Width of each whole expert, in whole tiles."""
        return -(-np.array(self.widths_E) // self.tile) * self.tile

    def bytes(self, e: int, width: int) -> float:
        return float(self.piece_bytes_E[e] + self.width_bytes_E[e] * width)

    def times(self, held: Sequence[dict[int, int]]) -> list[float]:
        ranks, experts, widths = _columns(held)
        padded = -(-widths // self.tile) * self.tile
        kinds = np.array(self.kind_R)[ranks]
        times = self.fixed_CE[kinds, experts] + self.slope_CE[kinds, experts] * padded
        return np.bincount(ranks, times, self.ranks).tolist()

    def held_bytes(self, held: Sequence[dict[int, int]]) -> np.ndarray:
        """[R]."""
        ranks, experts, widths = _columns(held)
        return np.bincount(ranks, self.piece_bytes_E[experts] + self.width_bytes_E[experts] * widths, self.ranks)

    def overflow(self, held: Sequence[dict[int, int]]) -> list[float]:
        """Bytes that each rank holds over its cap."""
        return np.maximum(self.held_bytes(held) - self.cap_R, 0.0).tolist()

    def items(self, chunks: Sequence[tuple[int, int]]) -> Items:
        """(expert, width) of parts that stay together, as what `whole` balances."""
        e_I, w_I = (np.array(column) for column in zip(*chunks, strict=True))
        padded_I = -(-w_I // self.tile) * self.tile
        return Items(
            time_CI=self.fixed_CE[:, e_I] + self.slope_CE[:, e_I] * padded_I,
            bytes_I=self.piece_bytes_E[e_I] + self.width_bytes_E[e_I] * w_I,
            kind_R=np.array(self.kind_R),
            cap_R=np.maximum(self.cap_R, 1.0) if self.capped else None,  # it divides
        )

    def held(self, chunks: Sequence[tuple[int, int]], owner_I: np.ndarray) -> list[dict[int, int]]:
        """held[r] of chunks on ranks."""
        held: list[dict[int, int]] = [{} for _ in self.kind_R]
        for (e, width), rank in zip(chunks, owner_I.tolist(), strict=True):
            held[rank][e] = held[rank].get(e, 0) + width
        return held


def _columns(held: Sequence[dict[int, int]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(rank, expert, width) of all pieces."""
    ranks = np.repeat(np.arange(len(held)), list(map(len, held)))
    experts, widths = (
        np.fromiter(chain.from_iterable(parts), int, ranks.size) for parts in (held, map(dict.values, held))
    )
    return ranks, experts, widths
