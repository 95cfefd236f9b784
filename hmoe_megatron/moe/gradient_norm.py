"""The gradient norm by logical expert: the same bits under any plan of whole experts.

Megatron adds up each rank's squares, then the ranks'. Which squares are whose depends on the plan, so the last bit of
the norm would too, and from the first clipped step on all weights. Here every rank learns the norm of every logical
expert's matrices and hands Megatron those of the experts that it would hold in Megatron's own, contiguous layout.
"""

import functools

import torch
import torch.distributed

from hmoe_megatron.moe.compute.flat import MATRICES
from hmoe_megatron.moe.experts import HMoEExperts


def attach(optimizer, model_chunks) -> None:
    """Replace what the experts' part of the ChainedOptimizer ``optimizer`` hands to Megatron's norm."""
    layers = [module for chunk in model_chunks for module in chunk.modules() if isinstance(module, HMoEExperts)]
    if not layers:
        return
    experts = expert_part(optimizer)
    if experts.config.use_precision_aware_optimizer:  # Transformer Engine's keeps gradients elsewhere
        return
    distributed = is_shared(experts)
    shared_by = experts.data_parallel_group if distributed and experts.data_parallel_group.size() > 1 else None
    stock = experts.get_grads_for_grad_norm

    def get_grads_for_grad_norm(grad_norm_group=None):
        if grad_norm_group is not None:
            return stock(grad_norm_group)
        return logical_norms(layers, _shards(experts) if distributed else _whole, shared_by)

    experts.get_grads_for_grad_norm = get_grads_for_grad_norm


def expert_part(optimizer):
    """Of Megatron's ChainedOptimizer, the one that has the routed experts."""
    (part,) = (
        part
        for part in optimizer.chained_optimizers
        if any(group["is_expert_parallel"] for group in part.optimizer.param_groups)
    )
    return part


def is_shared(part) -> bool:
    """Whether the copies of an expert share its state: the distributed optimizer."""
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    return isinstance(part, DistributedOptimizer)


def _whole(weight):
    """(place of its first element in the weight, flat gradient), or None."""
    grad = getattr(weight, "main_param", weight).grad
    return None if grad is None else (0, grad.view(-1))


def _shards(optimizer):
    """The same of the part that this rank's distributed optimizer holds, as a function of the weight."""
    weights = optimizer.model_float16_groups + optimizer.model_fp32_groups
    parts = optimizer.shard_fp32_from_float16_groups + optimizer.shard_fp32_groups
    shards = {
        weight: part
        for group, part_group in zip(weights, parts, strict=True)
        for weight, part in zip(group, part_group, strict=True)
    }

    def find(weight):
        shard = shards.get(weight)
        if shard is None or shard.grad is None:
            return None
        return optimizer._get_model_param_range_map(weight)["param"].start, shard.grad.view(-1)

    return find


@torch.no_grad()
def logical_norms(layers: list[HMoEExperts], find, shared_by=None) -> list[torch.Tensor]:
    """Norms, by logical expert and matrix, that this rank adds to the gradient norm; their squares over all ranks are
    the whole.

    find: see ``_whole``. shared_by: group of the ranks that share a matrix, None where each has all of its own. A
    matrix that one rank has whole counts with its fp32 norm as in Megatron; parts are added up in fp64, in which the
    square of an fp32 number is exact, and rounded once.
    """
    ep_group, experts = layers[0].ep_group, layers[0].config.num_moe_experts
    device = torch.cuda.current_device()
    squares = torch.zeros(len(layers), experts, 2, dtype=torch.float64, device=device)
    places, parts = [], []
    for index, layer in enumerate(layers):
        for matrix, name in enumerate(MATRICES):
            weight = getattr(layer, name)
            found = None if weight is None else find(weight)
            if found is not None:
                there, grads = _by_piece(layer, *found, weight.numel())
                places += [(index * experts + expert) * 2 + matrix for expert in there]
                parts += grads
    if parts:
        norms = torch.stack(torch._foreach_norm(parts, 2, dtype=None if shared_by is None else torch.float64))
        at = _on_device(tuple(places), device)
        squares.view(-1).index_put_((at,), norms.double().square(), accumulate=True)
    for group in (shared_by, ep_group) if shared_by else (ep_group,):
        torch.distributed.all_reduce(squares, group=group)
    if shared_by and shared_by.rank() > 0:
        return []
    first, last = _as_megatron_lays(experts, ep_group)
    norms = squares[:, first:last].sqrt().float().flatten()
    # Megatron's norm, without Transformer Engine and Apex, waits for the device at every tensor. On a CPU one tensor a
    # matrix, as it would have without us: the same bits.
    # None at all of a rank that has no expert there: a fused norm drops what waits before an empty tensor.
    return [norms] if norms.is_cuda and norms.numel() else list(norms.unbind())


def _by_piece(layer, start: int, grad: torch.Tensor, elements: int):
    """(logical experts, their parts) of a weight's flat gradient from element ``start`` on; those that have any."""
    end, total, first = start + grad.numel(), layer.held_width, 0
    experts, sizes = [], []
    for piece in layer.pieces:
        last = first + elements // total * piece.width
        if (size := min(last, end) - max(first, start)) > 0:
            experts.append(piece.expert)
            sizes.append(size)
        first = last
    return experts, list(grad[: sum(sizes)].split(sizes)) if sizes else []  # rows of no piece come last


def _as_megatron_lays(experts: int, ep_group) -> tuple[int, int]:
    """First logical expert of this rank in Megatron's contiguous layout, and the one after its last."""
    share, more = divmod(experts, ep_group.size())
    rank = ep_group.rank()
    first = rank * share + min(rank, more)
    return first, first + share + (rank < more)


@functools.cache
def _on_device(values: tuple[int, ...], device) -> torch.Tensor:
    """Copied once: a copy in every step would wait for the device."""
    return torch.tensor(values, device=device)
