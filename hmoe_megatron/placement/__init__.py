"""Placement of experts, or pieces of them, on expert-parallel ranks. Needs neither torch nor Megatron."""

from hmoe_megatron.placement.cost import Cost, FlopsCost
from hmoe_megatron.placement.plan import LayerPlan, Piece, PlacementPlan, Prediction, validate_pieces
from hmoe_megatron.placement.solver import contiguous_plan, plan_layer, plan_model
from hmoe_megatron.placement.table import plan_table

__all__ = [
    "Cost",
    "FlopsCost",
    "LayerPlan",
    "Piece",
    "PlacementPlan",
    "Prediction",
    "contiguous_plan",
    "plan_layer",
    "plan_model",
    "plan_table",
    "validate_pieces",
]
