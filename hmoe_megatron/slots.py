"""Logical experts to slots: the only place where the router's columns meet the plan's pieces.

Legend: T tokens, E logical experts, S slots over all expert-parallel ranks (ranks x the most pieces on a rank).
"""

import torch


def slot2expert(pieces_by_rank, num_experts: int) -> list[int]:
    """Logical expert of each slot, rank by rank; ``num_experts`` where a rank has fewer pieces than the fullest one.

    A piece is a slot: an expert cut in two has two slots, both fed by its one column of the router.
    """
    slots_per_rank = max(1, max(len(pieces) for pieces in pieces_by_rank))
    experts = []
    for pieces in pieces_by_rank:
        experts += [piece.expert for piece in pieces] + [num_experts] * (slots_per_rank - len(pieces))
    return experts


def logical_slot_order(pieces_by_rank) -> list[int]:
    """Slots in the order of their pieces' (logical expert, start of the width range), then the empty ones."""
    slots_per_rank = max(1, max(len(pieces) for pieces in pieces_by_rank))
    keys = []
    for pieces in pieces_by_rank:
        keys += [(0, piece.expert, piece.lo) for piece in pieces] + [(1, 0, 0)] * (slots_per_rank - len(pieces))
    return sorted(range(len(keys)), key=keys.__getitem__)


def to_slots(columns_TE: torch.Tensor, slot2expert_S: torch.Tensor) -> torch.Tensor:
    """Rearrange [T, E] columns (probabilities or routing map) to [T, S]; empty slots (index E) get zeros."""
    return torch.nn.functional.pad(columns_TE, (0, 1)).index_select(1, slot2expert_S)
