"""What every MoE layer of a model must know beyond Megatron's config: widths, plan, compute backend, counters."""

import dataclasses
import math

from hmoe_megatron.config import HMoEConfig
from hmoe_megatron.moe.compute.compute import ExpertCompute
from hmoe_megatron.placement.plan import LayerPlan, PlacementPlan
from hmoe_megatron.telemetry.counters import RoutingStats


@dataclasses.dataclass(eq=False)
class ExpertLayout:
    """Bound into the layers' specs. ``plan`` is the one in force: it changes where experts move while training.

    widths: decoder layer (from 0) -> width of each logical expert. plan: one LayerPlan a MoE layer, in the order of
    the layers. most: width that a rank has room for in each layer (see `most_widths`); None: just what the plan puts
    there. computed_by: which backend ``compute`` is, and why. seed: of the experts' initial weights.
    """

    settings: HMoEConfig
    widths: dict[int, tuple[int, ...]]
    plan: PlacementPlan
    compute: ExpertCompute
    computed_by: str
    stats: RoutingStats
    seed: int
    most: dict[int, int] | None = None

    @property
    def layers(self) -> list[int]:
        """Decoder layers (from 0) that hold experts."""
        return list(self.widths)

    def pieces(self, layer: int):
        """Pieces of each expert-parallel rank in decoder layer ``layer``."""
        return self._layer_plan(layer).pieces

    def most_width(self, layer: int) -> int | None:
        """Width of all pieces that a rank has room for in decoder layer ``layer``."""
        return None if self.most is None else self.most[layer]

    def has_cuts(self, layer: int) -> bool:
        """Whether an expert of the layer lives in more than one piece."""
        return self._layer_plan(layer).cuts > 0

    def _layer_plan(self, layer: int) -> LayerPlan:
        return self.plan.layers[self.plan.index(layer)]

    def slots(self) -> int:
        """Most slots a layer needs over all ranks."""
        return self.plan.ranks * max(plan.slots_per_rank for plan in self.plan.layers)


def most_widths(plan: PlacementPlan, room: float, multiple: int) -> dict[int, int]:
    """Decoder layer -> width that every rank gets room for: an even share and ``room`` of it more, as a multiple of
    ``multiple``, at least what ``plan`` puts on its fullest rank."""
    found = {}
    for number, layer in zip(plan.numbers, plan.layers, strict=True):
        fullest = max(sum(piece.width for piece in pieces) for pieces in layer.pieces)
        wanted = max(fullest, sum(layer.widths) / plan.ranks * (1 + room))
        found[number] = -(-math.ceil(wanted) // multiple) * multiple
    return found
