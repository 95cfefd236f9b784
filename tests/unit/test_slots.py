"""Logical columns to slots: each piece gets its expert's column, empty slots nothing."""

import torch

from hmoe_megatron.placement.plan import Piece
from hmoe_megatron.slots import slot2expert, to_slots

PIECES = ((Piece(2, 0, 5), Piece(0, 0, 3), Piece(1, 0, 2)), (Piece(1, 2, 9),), ())


def test_slots_of_a_plan():
    assert slot2expert(PIECES, 3) == [2, 0, 1, 1, 3, 3, 3, 3, 3]
    assert slot2expert(((), ()), 3) == [3, 3], "a rank has one slot at least"


def test_columns_follow_their_expert_and_gradients_come_back_summed():
    columns_TE = torch.arange(6.0).view(2, 3).requires_grad_()
    slots_TS = to_slots(columns_TE, torch.tensor(slot2expert(PIECES, 3)))
    assert slots_TS.tolist() == [[2, 0, 1, 1, 0, 0, 0, 0, 0], [5, 3, 4, 4, 0, 0, 0, 0, 0]]
    slots_TS.sum().backward()
    assert columns_TE.grad.tolist() == [[1, 2, 1], [1, 2, 1]]


def test_a_routing_map_stays_boolean():
    routing_map = torch.tensor([[True, False, True]])
    slots = to_slots(routing_map, torch.tensor(slot2expert(PIECES, 3)))
    assert slots.dtype == torch.bool and slots.sum() == 2
