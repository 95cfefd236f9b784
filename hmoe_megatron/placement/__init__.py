"""Placement of experts, or pieces of them, on expert-parallel ranks. Needs neither torch nor Megatron."""

from hmoe_megatron.placement.cost import CostModel, Prediction
from hmoe_megatron.placement.moves import Move, diff
from hmoe_megatron.placement.plan import LayerPlan, Piece, PlacementPlan, validate_pieces
from hmoe_megatron.placement.planner import contiguous_plan, plan_layer, plan_model
from hmoe_megatron.placement.profiles import FLOPS, PROFILES, Profile, profile_named
from hmoe_megatron.placement.ranks import Rank, nodes_of
from hmoe_megatron.placement.replan import ReplanPolicy, moving_time
from hmoe_megatron.placement.solver import InfeasiblePlan
from hmoe_megatron.placement.table import plan_table

__all__ = [
    "FLOPS",
    "PROFILES",
    "CostModel",
    "InfeasiblePlan",
    "LayerPlan",
    "Move",
    "Piece",
    "PlacementPlan",
    "Prediction",
    "Profile",
    "Rank",
    "ReplanPolicy",
    "contiguous_plan",
    "diff",
    "moving_time",
    "nodes_of",
    "plan_layer",
    "plan_model",
    "plan_table",
    "profile_named",
    "validate_pieces",
]
