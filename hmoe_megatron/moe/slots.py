"""Logical experts to slots: the only place where the router's columns meet the plan's pieces.

Legend: T tokens, E logical experts, S slots over all expert-parallel ranks (ranks x the most pieces on a rank).
"""

import copy

import torch


def slot2expert(pieces_by_rank, num_experts: int, slots_per_rank: int = 1) -> list[int]:
    """Logical expert of each slot, rank by rank; ``num_experts`` where a rank has fewer pieces than the fullest one.

    A piece is a slot: an expert cut in two has two slots, both fed by its one column of the router. slots_per_rank:
    give every rank so many at least.
    """
    slots_per_rank = max(slots_per_rank, max(len(pieces) for pieces in pieces_by_rank))
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


def most_slots(slot2expert_S: list[int], num_experts: int, settings, topk: int) -> int:
    """Most slots that one token can fill: those of the experts most cut, as many as the router may choose.

    settings: HMoEConfig. topk: ``--moe-router-topk``, which counts with the Top-K router only.
    """
    experts = topk if settings.router == "topk" else settings.max_experts_per_token or num_experts
    slots_E = [slot2expert_S.count(expert) for expert in range(num_experts)]
    return sum(sorted(slots_E, reverse=True)[:experts])


def dispatch_slots(config, layout, layer: int):
    """(slot2expert, copy of ``config`` that counts slots, for Megatron's dispatchers) of decoder layer ``layer``."""
    experts = config.num_moe_experts
    flex = config.moe_token_dispatcher_type == "flex"
    # HybridEP has one buffer for all layers: with one number of slots it is not allocated again from layer to layer.
    one_size = flex and config.moe_flex_dispatcher_backend == "hybridep"
    slots = slot2expert(layout.pieces(layer), experts, layout.slots() // layout.plan.ranks if one_size else 1)
    slot_config = copy.copy(config)
    slot_config.num_moe_experts = len(slots)
    # DeepEP moves a token to as many slots as this, the most probable ones.
    slot_config.moe_router_topk = most_slots(slots, experts, layout.settings, config.moe_router_topk)
    if flex or layout.settings.router == "topp" or layout.has_cuts(layer):
        # A token then fills a varying number of slots. With a capacity factor that is not None alltoall sizes its
        # buffers by the routing map instead of tokens * K, and DeepEP leaves out slots of probability 0. Nothing is
        # dropped.
        slot_config.moe_expert_capacity_factor = 1.0
    return slots, slot_config


def unpadded(config):
    """Copy of ``config`` under which Megatron's flex dispatchers don't pad an expert's rows to the tiles of FP8
    kernels: experts compute in the model's own precision."""
    config = copy.copy(config)
    config.fp8 = config.fp4 = None
    config.use_transformer_engine_op_fuser = False
    return config


def to_slots(columns_TE: torch.Tensor, slot2expert_S: torch.Tensor) -> torch.Tensor:
    """Rearrange [T, E] columns (probabilities or routing map) to [T, S]; empty slots (index E) get zeros."""
    return torch.nn.functional.pad(columns_TE, (0, 1)).index_select(1, slot2expert_S)
