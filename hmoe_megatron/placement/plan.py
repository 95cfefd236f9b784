"""Where every piece of every expert lives: the plan, its checks, and its file.

Letters: L MoE layers, E logical experts, F width of one expert, r rank of the expert-parallel group.
The file is JSON; a reader trusts nothing in it (see `PlacementPlan.from_json`).
"""

import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from numbers import Integral
from typing import NamedTuple

from hmoe_megatron.files import atomic_write, read_text
from hmoe_megatron.placement.cost import CostModel, Prediction, predict
from hmoe_megatron.placement.plan_checks import (
    MAX_FILE_BYTES,
    RANK_FIELDS,
    SCHEMA,
    content_problems,
    form_problems,
    listed,
    mismatches,
    parse_json,
)
from hmoe_megatron.placement.ranks import Rank, as_ranks
from hmoe_megatron.untrusted import canonical, checksum
from hmoe_megatron.widths import MAX_LAYERS, ranges_text, widths_fingerprint


class Piece(NamedTuple):
    """The range [lo, hi) of one logical expert's width. An uncut expert is one piece [0, F)."""

    expert: int
    lo: int
    hi: int

    @property
    def width(self) -> int:
        return self.hi - self.lo

    def __str__(self):
        return f"expert {self.expert} [{self.lo}:{self.hi})"


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
    """One LayerPlan for each MoE layer, all on the same ranks.

    cost: what it was planned with; rank_specs: the ranks planned for (default: equal ones, without a cap); stages:
    pipeline stage of each layer (default: one), for rank r of two stages is two GPUs; numbers: decoder layer, from 0,
    of each MoE layer (default: in order), the one that messages, tables and flags use. A plan over the ranks' memory
    can be made, to be compared with, but not read (see `missing_bytes`).
    """

    layers: tuple[LayerPlan, ...]
    cost: CostModel = CostModel()
    rank_specs: tuple[Rank, ...] = ()
    stages: tuple[int, ...] = ()
    numbers: tuple[int, ...] = ()

    def __post_init__(self):
        if not self.layers or len({layer.ranks for layer in self.layers}) > 1:
            raise ValueError(
                f"placement plan: needs one layer or more, all on the same number of ranks; got "
                f"{[layer.ranks for layer in self.layers]} ranks by layer"
            )
        object.__setattr__(self, "rank_specs", as_ranks(self.rank_specs or self.ranks))
        object.__setattr__(self, "stages", tuple(self.stages) or (0,) * len(self.layers))
        object.__setattr__(self, "numbers", layer_numbers(self.numbers, len(self.layers)))
        if len(self.rank_specs) != self.ranks or len(self.stages) != len(self.layers):
            raise ValueError(
                f"placement plan: {len(self.rank_specs)} rank descriptions for {self.ranks} ranks, "
                f"{len(self.stages)} stages for {len(self.layers)} layers"
            )
        if not all(isinstance(stage, Integral) and 0 <= stage <= MAX_LAYERS for stage in self.stages):
            raise ValueError(f"placement plan: stages {self.stages!s:.80} are not whole numbers from 0 to {MAX_LAYERS}")

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

    def index(self, number: int) -> int:
        """Where decoder layer `number` is in `layers`. Raises ValueError for one without experts here."""
        if number not in self.numbers:
            raise ValueError(f"layer {number}: the plan has layers {ranges_text(self.numbers)}")
        return self.numbers.index(number)

    @property
    def time(self) -> float:
        """Predicted, of one micro-batch: of each layer the slowest rank, their sum over the slowest stage's layers."""
        return self._slowest_stage(max(layer.predicted.time) for layer in self.layers)

    @property
    def bound(self) -> float:
        """What `time` can't be below, whatever the plan."""
        return self._slowest_stage(layer.predicted.bound for layer in self.layers)

    def _slowest_stage(self, times_L: Iterable[float]) -> float:
        by_stage = Counter()
        for stage, time in zip(self.stages, times_L, strict=True):
            by_stage[stage] += time
        return max(by_stage.values())

    def held_bytes(self) -> dict[tuple[int, int], int]:
        """(stage, rank) -> bytes of its pieces in the layers of that pipeline stage.

        Counted anew from pieces, loads and cost, whatever the layers predict.
        """
        held = Counter()
        for stage, layer in zip(self.stages, self.layers, strict=True):
            counted = predict(layer.pieces, layer.tokens, self.cost, self.rank_specs, bound=0.0)
            held.update({(stage, rank): amount for rank, amount in enumerate(counted.bytes)})
        return dict(held)

    def missing_bytes(self) -> dict[tuple[int, int], int]:
        """(stage, rank) -> bytes over its cap, as `held_bytes` counts; without those that fit."""
        if all(rank.bytes is None for rank in self.rank_specs):
            return {}
        return {
            (stage, rank): amount - cap
            for (stage, rank), amount in sorted(self.held_bytes().items())
            if (cap := self.rank_specs[rank].bytes) is not None and amount > cap
        }

    def to_json(self) -> str:
        """The plan as JSON; the same plan gives the same text on every machine."""
        body = {
            "schema": SCHEMA,
            "widths_fingerprint": self.widths_fingerprint,
            "cost": self.cost.to_dict(),
            "ranks": [
                [int(rank.node), float(rank.speed), None if rank.bytes is None else int(rank.bytes)]
                for rank in self.rank_specs
            ],
            "stages": [int(stage) for stage in self.stages],
            "numbers": self.numbers,
            "layers": [
                {
                    "widths": layer.widths,
                    "tokens": layer.tokens,
                    "pieces": layer.pieces,
                    "predicted": vars(layer.predicted),
                }
                for layer in self.layers
            ],
        }
        return canonical(body | {"sha256": checksum(body)}) + "\n"

    @classmethod
    def from_json(
        cls, text: str, widths_LE: Sequence[Sequence[int]] | None = None, ep_size: int | None = None
    ) -> "PlacementPlan":
        """The plan of a text by `to_json`; made for `widths_LE` and `ep_size` ranks, where these are given.

        Types, sizes, unknown, missing and repeated fields, coverage, memory caps, fingerprint and checksum are
        checked. What it predicts may be anything finite: it is for display. Raises ValueError that lists every
        problem found, and nothing else whatever the text is.
        """
        body = parse_json(text)
        if problems := form_problems(body):
            raise ValueError(listed("placement plan", problems))
        cost = _attempt(problems, "", CostModel.from_dict, body["cost"])
        if cost:  # else it may be nested too deeply for a checksum
            problems += content_problems(body)
        ranks = tuple(_attempt(problems, f"ranks[{r}]: ", Rank, *spec) for r, spec in enumerate(body["ranks"]))
        layers = tuple(
            _read_layer(problems, f"layer {number}", layer)
            for number, layer in zip(body["numbers"], body["layers"], strict=True)
        )
        if not problems:
            plan = cls(layers, cost, ranks, tuple(body["stages"]), tuple(body["numbers"]))
            problems += [
                f"rank {rank} lacks {missing} bytes, of {ranks[rank].bytes}, in pipeline stage {stage}; make "
                "the plan again"
                for (stage, rank), missing in plan.missing_bytes().items()
            ]
        if problems := problems + mismatches(body, widths_LE, ep_size):
            raise ValueError(listed("placement plan", problems))
        return plan

    def save(self, path: str | os.PathLike) -> None:
        """Write the plan atomically."""
        atomic_write(path, self.to_json().encode())

    @classmethod
    def load(cls, path: str | os.PathLike, widths_LE: Sequence[Sequence[int]], ep_size: int) -> "PlacementPlan":
        """The plan in file `path`, for these widths and this many ranks.

        Raises ValueError with the path and every problem: a file that can't be read, is damaged (see
        `from_json`), or was made for other widths, layers or expert-parallel size.
        """
        try:
            return cls.from_json(_read_text(path), widths_LE, ep_size)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None


def layer_numbers(numbers: Sequence[int], layers: int) -> tuple[int, ...]:
    """Decoder layers as Python numbers, by default 0, 1, ... Raises ValueError unless they rise, one a layer."""
    numbers = tuple(numbers) or tuple(range(layers))
    whole = all(isinstance(n, Integral) and not isinstance(n, bool) and 0 <= n < MAX_LAYERS for n in numbers)
    if not whole or len(numbers) != layers or any(a >= b for a, b in zip(numbers, numbers[1:], strict=False)):
        raise ValueError(
            f"decoder layers {numbers!s:.80}: give {layers} rising whole numbers from 0 to {MAX_LAYERS - 1}"
        )
    return tuple(map(int, numbers))


def _attempt(problems: list[str], where: str, make: Callable, *values):
    """make(*values); None where it raises ValueError, which is added to `problems`."""
    try:
        return make(*values)
    except ValueError as error:
        problems.append(f"{where}{error}")


def _read_layer(problems: list[str], where: str, layer: dict) -> LayerPlan | None:
    """A layer that passed `form_problems`; None where its pieces are no placement, said in `problems`."""
    pieces = tuple(tuple(Piece(*p) for p in rank) for rank in layer["pieces"])
    predicted = {name: tuple(layer["predicted"][name]) for name in RANK_FIELDS}
    try:
        return LayerPlan(
            pieces,
            tuple(layer["widths"]),
            tuple(layer["tokens"]),
            Prediction(**predicted, bound=layer["predicted"]["bound"]),
        )
    except ValueError:
        problems += [f"{where}: {problem}" for problem in validate_pieces(pieces, layer["widths"])]


def _read_text(path: str | os.PathLike) -> str:
    try:
        return read_text(path, MAX_FILE_BYTES)
    except ValueError as error:
        raise ValueError(f"{error}; give a plan file (.json), or auto, to --hmoe-placement") from None


def validate_pieces(pieces: Sequence[Sequence[Piece]], widths: Sequence[int]) -> list[str]:
    """Problems of pieces[r] as a placement of experts of these widths; [] if each width unit is placed once.

    A rank holds at most one piece of an expert (two that meet are one piece); it may hold none at all.
    """
    if _is_partition(pieces, widths):
        return []
    problems = [f"expert {e}: width {F} is not positive" for e, F in enumerate(widths) if F < 1]
    if not len(pieces) or not len(widths):
        problems.append(f"{len(pieces)} ranks and {len(widths)} experts: one of each is the least")
    placed = defaultdict(list)
    for rank, held in enumerate(pieces):
        problems += [
            f"rank {rank}: {n} pieces of expert {e}; join them into one"
            for e, n in sorted(Counter(p.expert for p in held).items())
            if n > 1
        ]
        for p in held:
            if not 0 <= p.expert < len(widths):
                problems.append(f"rank {rank}: expert {p.expert} is not one of 0-{len(widths) - 1}")
            elif not 0 <= p.lo < p.hi <= widths[p.expert]:
                problems.append(
                    f"rank {rank}: expert {p.expert} [{p.lo}:{p.hi}) is no range within its width {widths[p.expert]}"
                )
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


def _is_partition(pieces: Sequence[Sequence[Piece]], widths: Sequence[int]) -> bool:
    """True if there is nothing to say: a planner makes many plans, and the sentences take ten times as long."""
    ranges = sorted(chain.from_iterable(pieces))
    if any(len({p[0] for p in held}) < len(held) for held in pieces) or not len(widths):
        return False
    expert, end = 0, 0
    for e, lo, hi in ranges:
        if end == widths[expert] and e == expert + 1 < len(widths):
            expert, end = e, 0
        if e != expert or lo != end or hi <= lo or hi > widths[e]:
            return False
        end = hi
    return expert == len(widths) - 1 and end == widths[expert]
