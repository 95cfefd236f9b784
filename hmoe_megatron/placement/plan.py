"""Where every piece of every expert lives: the plan, its checks, and its file.

Letters: L MoE layers, E logical experts, F width of one expert, r rank of the expert-parallel group.
The file is JSON; a reader trusts nothing in it (see `PlacementPlan.from_json`).
"""

import os
import stat
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from hmoe_megatron.files import write_whole
from hmoe_megatron.placement.plan_checks import (
    MAX_FILE_BYTES,
    RANK_FIELDS,
    SCHEMA,
    canonical,
    checksum,
    content_problems,
    form_problems,
    listed,
    mismatches,
    parse_json,
)
from hmoe_megatron.widths import widths_fingerprint


@dataclass(frozen=True, order=True)
class Piece:
    """The range [lo, hi) of one logical expert's width. An uncut expert is one piece [0, F)."""

    expert: int
    lo: int
    hi: int

    @property
    def width(self) -> int:
        return self.hi - self.lo


@dataclass(frozen=True)
class Prediction:
    """What a plan costs each rank under the loads it was made for; one number a rank in each tuple.

    cost: in the unit of the cost model (training FLOPs without a hardware profile, else seconds); tokens:
    rows computed, a cut expert's on each of its ranks; flops: of training; params: weights held. bound: no
    plan for these ranks, with cuts where they were allowed, has a slowest rank below it; in the unit of cost.
    """

    cost: tuple[float, ...]
    tokens: tuple[float, ...]
    flops: tuple[float, ...]
    params: tuple[int, ...]
    bound: float

    @property
    def gap(self) -> float:
        """Slowest rank over the bound, minus 1."""
        return max(max(self.cost) / self.bound - 1, 0.0) if self.bound else 0.0


@dataclass(frozen=True)
class LayerPlan:
    """pieces[r]: pieces of rank r; widths[e]: F of expert e; tokens[e]: the load planned for, in any unit.

    Places every width unit exactly once: raises ValueError with all problems of `validate_pieces`.
    """

    pieces: tuple[tuple[Piece, ...], ...]
    widths: tuple[int, ...]
    tokens: tuple[float, ...]
    predicted: Prediction

    def __post_init__(self):
        problems = validate_pieces(self.pieces, self.widths)
        if len(self.tokens) != len(self.widths):
            problems.append(f"{len(self.tokens)} loads for {len(self.widths)} experts")
        if problems:
            raise ValueError(listed("placement of a layer", problems))

    @property
    def ranks(self) -> int:
        return len(self.pieces)

    @property
    def slots_per_rank(self) -> int:
        """Most pieces on a rank, at least 1."""
        return max(1, *map(len, self.pieces))

    @property
    def cuts(self) -> int:
        return sum(map(len, self.pieces)) - len(self.widths)


@dataclass(frozen=True)
class PlacementPlan:
    """One LayerPlan for each MoE layer, all on the same ranks."""

    layers: tuple[LayerPlan, ...]

    def __post_init__(self):
        if not self.layers or len({layer.ranks for layer in self.layers}) > 1:
            raise ValueError(f"placement plan: needs one layer or more, all on the same number of ranks; got "
                             f"{[layer.ranks for layer in self.layers]} ranks by layer")

    schema = SCHEMA

    @property
    def ranks(self) -> int:
        return self.layers[0].ranks

    @property
    def widths(self) -> tuple[tuple[int, ...], ...]:
        """Widths [L][E] that the plan was made for."""
        return tuple(layer.widths for layer in self.layers)

    @property
    def widths_fingerprint(self) -> str:
        return widths_fingerprint(self.widths)

    def to_json(self) -> str:
        """The plan as JSON; the same plan gives the same text on every machine."""
        body = {
            "schema": SCHEMA,
            "widths_fingerprint": self.widths_fingerprint,
            "ep_size": self.ranks,
            "layers": [{
                "widths": layer.widths,
                "tokens": layer.tokens,
                "pieces": [[[p.expert, p.lo, p.hi] for p in rank] for rank in layer.pieces],
                "predicted": vars(layer.predicted),
            } for layer in self.layers],
        }
        return canonical(body | {"sha256": checksum(body)}) + "\n"

    @classmethod
    def from_json(
        cls, text: str, widths_LE: Sequence[Sequence[int]] | None = None, ep_size: int | None = None
    ) -> "PlacementPlan":
        """The plan of a text by `to_json`; made for `widths_LE` and `ep_size` ranks, where these are given.

        Types, sizes, unknown, missing and repeated fields, coverage, fingerprint and checksum are checked.
        Raises ValueError that lists every problem found, and nothing else whatever the text is.
        """
        body = parse_json(text)
        if problems := form_problems(body):
            raise ValueError(listed("placement plan", problems))
        problems = content_problems(body) + mismatches(body, widths_LE, ep_size)
        layers = []
        for number, layer in enumerate(body["layers"]):
            predicted = layer["predicted"]
            prediction = Prediction(*(tuple(predicted[name]) for name in RANK_FIELDS), predicted["bound"])
            pieces = tuple(tuple(Piece(*p) for p in rank) for rank in layer["pieces"])
            try:
                layers.append(LayerPlan(pieces, tuple(layer["widths"]), tuple(layer["tokens"]), prediction))
            except ValueError as error:
                problems.append(f"layer {number}: {error}")
        if problems:
            raise ValueError(listed("placement plan", problems))
        return cls(tuple(layers))

    def save(self, path: str | os.PathLike) -> None:
        """Write the plan whole or not at all."""
        write_whole(path, self.to_json().encode())

    @classmethod
    def load(
        cls, path: str | os.PathLike, widths_LE: Sequence[Sequence[int]], ep_size: int
    ) -> "PlacementPlan":
        """The plan in file `path`, for these widths and this many ranks.

        Raises ValueError with the path and every problem: a file that can't be read, is damaged (see
        `from_json`), or was made for other widths, layers or expert-parallel size.
        """
        try:
            return cls.from_json(_read_text(path), widths_LE, ep_size)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None


def _read_text(path: str | os.PathLike) -> str:
    remedy = "give a plan file (.json), or auto, to --hmoe-placement"
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # a pipe would block, a device might never end
            raise ValueError(f"not a regular file; {remedy}")
        with open(path, "rb") as file:
            return file.read(MAX_FILE_BYTES + 1).decode()
    except OSError as error:
        raise ValueError(f"{error.strerror}; {remedy}") from None
    except UnicodeDecodeError:
        raise ValueError(f"not UTF-8 text; {remedy}") from None


def validate_pieces(pieces: Sequence[Sequence[Piece]], widths: Sequence[int]) -> list[str]:
    """Problems of pieces[r] as a placement of experts of these widths; [] if each width unit is placed once.

    A rank holds at most one piece of an expert (two that meet are one piece); it may hold none at all.
    """
    problems = [f"expert {e}: width {F} is not positive" for e, F in enumerate(widths) if F < 1]
    if not len(pieces) or not len(widths):
        problems.append(f"{len(pieces)} ranks and {len(widths)} experts: one of each is the least")
    placed = defaultdict(list)
    for rank, held in enumerate(pieces):
        problems += [f"rank {rank}: {n} pieces of expert {e}; join them into one"
                     for e, n in sorted(Counter(p.expert for p in held).items()) if n > 1]
        for p in held:
            if not 0 <= p.expert < len(widths):
                problems.append(f"rank {rank}: expert {p.expert} is not one of 0-{len(widths) - 1}")
            elif not 0 <= p.lo < p.hi <= widths[p.expert]:
                problems.append(f"rank {rank}: expert {p.expert} [{p.lo}:{p.hi}) is no range within its "
                                f"width {widths[p.expert]}")
            else:
                placed[p.expert].append((p.lo, p.hi))
    for e, F in enumerate(widths):
        end = 0
        for lo, hi in sorted(placed[e]) + [(F, F)]:
            if lo > end:
                problems.append(f"expert {e}: [{end}:{lo}) is placed nowhere")
            elif lo < min(end, hi):
                problems.append(f"expert {e}: [{lo}:{min(end, hi)}) is placed twice")
            end = max(end, hi)
    return problems
