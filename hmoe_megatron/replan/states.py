"""What Megatron's optimizers keep of a weight on this rank: the fp32 master and the moments, or a share of them."""

from typing import NamedTuple

import torch

from hmoe_megatron.moe.gradient_norm import is_shared

KINDS_NOT_MOVED = ("step",)  # one number a weight, the same on every rank


class Held(NamedTuple):
    """start: place in the flat weight of the first element that this rank holds; states: kind -> its elements, flat."""

    start: int
    states: dict[str, torch.Tensor]


def held_of(part, weight) -> Held:
    """``part``: of `gradient_norm.expert_part`, whose tensors these are; "param" is the master, or the weight."""
    if is_shared(part):
        if weight not in part.model_param_group_index_map:
            return Held(0, {})
        found = part._get_main_param_and_optimizer_states(weight)
        start = part._get_model_param_range_map(weight)["param"].start
    else:
        master = getattr(weight, "main_param", weight)
        found = {"param": master.data, **part.optimizer.state.get(master, {})}
        start = 0
    states = {
        kind: value.detach().view(-1)
        for kind, value in found.items()
        if isinstance(value, torch.Tensor) and value.dim() and kind not in KINDS_NOT_MOVED
    }
    return Held(start, states)


def whole(part, weight, held: Held, kind: str) -> torch.Tensor:
    """[rows, H] of one kind. Collective over the copies of the experts where they share it."""
    if not is_shared(part):
        return held.states[kind].view(weight.shape)
    flat = torch.zeros(weight.numel(), dtype=torch.float32, device=weight.device)
    if (own := held.states.get(kind)) is not None:
        flat[held.start : held.start + own.numel()] = own
    if part.data_parallel_group.size() > 1:  # bits of one copy and zeros: a sum of integers changes none, -0.0 neither
        torch.distributed.all_reduce(flat.view(torch.int32), group=part.data_parallel_group)
    return flat.view(weight.shape)
