"""Capacity of experts of different width: how many tokens each takes at most, and which are dropped.

Legend: T tokens on this rank, E logical experts.
"""

import torch


def capacities(widths_E: torch.Tensor, rows: int | torch.Tensor, factor: float) -> torch.Tensor:
    """Most rows of each expert, int64: ceil(factor * rows / E * mean width / its width).

    What every expert may compute is the same, ``factor`` times an even share of the FLOPs. ``rows``: pairs of token and
    expert on this rank, T K with Top-K. At equal widths this is Megatron's --moe-expert-capacity-factor.
    """
    share = torch.as_tensor(rows, dtype=torch.float64, device=widths_E.device) / len(widths_E) * factor
    return (share * (widths_E.double().mean() / widths_E)).ceil().long()


def within_capacity(weights_TE: torch.Tensor, routing_map_TE: torch.Tensor, capacity_E: torch.Tensor, policy: str):
    """The routing map [T, E] without what goes beyond ``capacity_E``. Kept are, with ``policy`` "probs", the tokens of
    largest weight, and with "position" the first ones; among equal weights the first too."""
    score_TE = weights_TE.detach().float() if policy == "probs" else torch.zeros_like(weights_TE, dtype=torch.float32)
    order_TE = score_TE.masked_fill(~routing_map_TE, -1.0).argsort(dim=0, descending=True, stable=True)
    place_TE = torch.arange(len(order_TE), device=order_TE.device).unsqueeze(1) < capacity_E
    return routing_map_TE & torch.zeros_like(routing_map_TE).scatter(0, order_TE, place_TE)
