"""What every MoE layer of a model must know beyond Megatron's config: widths, plan, compute backend, counters."""

import dataclasses

from hmoe_megatron.config import HMoEConfig
from hmoe_megatron.moe.compute.compute import ExpertCompute
from hmoe_megatron.placement.plan import LayerPlan, PlacementPlan
from hmoe_megatron.telemetry.counters import RoutingStats


@dataclasses.dataclass(frozen=True)
class ExpertLayout:
    """Bound into the layers' specs.

    widths: decoder layer (from 0) -> width of each logical expert. plan: one LayerPlan a MoE layer, in the order of
    the layers. computed_by: which backend ``compute`` is, and why. seed: of the experts' initial weights.
    """

    settings: HMoEConfig
    widths: dict[int, tuple[int, ...]]
    plan: PlacementPlan
    compute: ExpertCompute
    computed_by: str
    stats: RoutingStats
    seed: int

    @property
    def layers(self) -> list[int]:
        """Decoder layers (from 0) that hold experts."""
        return list(self.widths)

    def pieces(self, layer: int):
        """Pieces of each expert-parallel rank in decoder layer ``layer``."""
        return self._layer_plan(layer).pieces

    def has_cuts(self, layer: int) -> bool:
        """Whether an expert of the layer lives in more than one piece."""
        return self._layer_plan(layer).cuts > 0

    def _layer_plan(self, layer: int) -> LayerPlan:
        return self.plan.layers[self.plan.index(layer)]

    def slots(self) -> int:
        """Most slots a layer needs over all ranks."""
        return self.plan.ranks * max(plan.slots_per_rank for plan in self.plan.layers)
