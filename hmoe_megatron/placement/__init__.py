"""Placement of experts, or pieces of them, on expert-parallel ranks. Needs neither torch nor Megatron.

A plan's making, step by step:
1. ranks.py, profiles.py, cost.py: the ranks, and what a piece costs on one: time, FLOPs, bytes.
2. problem.py: one layer's loads, widths, caps and limits of cuts as arrays; bound.py: what no plan can be faster than.
3. lpt.py: whole experts by longest processing time, then moves and swaps.
4. width_splitting.py: experts cut by width where that makes the slowest rank faster.
5. milp.py: under tight caps, where the others find nothing; solver.py runs 3 to 5.
6. rank_assignment.py: which rank gets which share, so that bytes add up evenly, or few move from an old plan.
7. planner.py: layers and stages together: a PlacementPlan (plan.py), checked when it is read (plan_checks.py).
"""

import importlib

# Imported when asked for: scipy, behind the solver, takes seconds, and whoever reads a plan needs none of it.
_PLACES = {
    "cost": "CostModel Prediction",
    "moves": "Move diff",
    "plan": "LayerPlan Piece PlacementPlan validate_pieces",
    "planner": "contiguous_plan plan_layer plan_model",
    "profiles": "FLOPS PROFILES Profile profile_named",
    "ranks": "Rank nodes_of",
    "solver": "InfeasiblePlan",
    "table": "plan_table",
}
_MODULE_OF = {name: module for module, names in _PLACES.items() for name in names.split()}
__all__ = sorted(_MODULE_OF)


def __getattr__(name: str):
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
