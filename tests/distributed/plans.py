"""Placement plans written by hand, for tests that compare plans."""

from hmoe_megatron.placement.cost import CostModel, predict
from hmoe_megatron.placement.plan import LayerPlan, Piece, PlacementPlan
from hmoe_megatron.placement.ranks import as_ranks

WIDTHS = (16, 32, 48, 64)


def whole(*ranks):
    """whole((0, 3), (1, 2)): experts 0 and 3 on the first rank, 1 and 2 on the second."""
    return tuple(tuple(Piece(e, 0, WIDTHS[e]) for e in experts) for experts in ranks)


def cut(*ranks):
    """cut(((3, 0, 24),), ((0, 0, 16), ...)): pieces (expert, lo, hi) of each rank."""
    return tuple(tuple(Piece(*piece) for piece in pieces) for pieces in ranks)


def save_plan(path, *pieces_by_layer) -> str:
    """Write a plan of one entry a layer, all of WIDTHS; returns its path as a flag's value."""
    tokens = (1.0,) * len(WIDTHS)
    PlacementPlan(
        tuple(
            LayerPlan(pieces, WIDTHS, tokens, predict(pieces, tokens, CostModel(), as_ranks(len(pieces)), bound=0.0))
            for pieces in pieces_by_layer
        )
    ).save(path)
    return str(path)
