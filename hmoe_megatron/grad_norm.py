"""The gradient norm by logical expert: the same bits under any plan of whole experts.

Megatron adds up each rank's squares, then the ranks'. Which squares are whose depends on the plan, so the last bit of
the norm would too, and from the first clipped step on all weights. Here every rank learns the norm of every logical
expert's matrices and hands Megatron those of the experts that it would hold in Megatron's own, contiguous layout.
"""

import functools

import torch
import torch.distributed

from hmoe_megatron.experts import HMoEExperts
from hmoe_megatron.slots import slot2expert


def use_logical_norm() -> None:
    """Give this norm to every optimizer that Megatron's training builds from now on for a model with HMoE's experts."""
    from megatron.training import training

    stock = training.get_megatron_optimizer
    if getattr(stock, "logical_norm", False):
        return

    @functools.wraps(stock)
    def get_megatron_optimizer(config, model_chunks, *args, **kwargs):
        optimizer = stock(config, model_chunks, *args, **kwargs)
        attach(optimizer, [module for chunk in model_chunks for module in chunk.modules()])
        return optimizer

    get_megatron_optimizer.logical_norm = True
    training.get_megatron_optimizer = get_megatron_optimizer


def attach(optimizer, modules) -> None:
    """Replace what the experts' part of the ChainedOptimizer ``optimizer`` hands to Megatron's norm."""
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    layers = [module for module in modules if isinstance(module, HMoEExperts)]
    if not layers:
        return
    (experts,) = (
        part for part in optimizer.chained_optimizers
        if any(group["is_expert_parallel"] for group in part.optimizer.param_groups)
    )  # fmt: skip
    distributed = isinstance(experts, DistributedOptimizer)
    if experts.config.use_precision_aware_optimizer or (distributed and all(map(_as_megatron_lays, layers))):
        # Transformer Engine's optimizer keeps gradients elsewhere. The distributed optimizer cuts matrices by their
        # place in a buffer: Megatron's norm of that is Megatron's only with Megatron's cuts.
        return
    stock = experts.get_grads_for_grad_norm

    def get_grads_for_grad_norm(grad_norm_group=None):
        if grad_norm_group is not None:
            return stock(grad_norm_group)
        return logical_norms(layers, _sharded_grads(experts) if distributed else None, experts)

    experts.get_grads_for_grad_norm = get_grads_for_grad_norm


def _as_megatron_lays(layer: HMoEExperts) -> bool:
    experts, layout = layer.config.num_moe_experts, layer.config.hmoe
    slots = slot2expert(layout.pieces(layer.layer), experts)
    return slots == list(range(experts)) and len(set(layer.widths)) == 1


def _sharded_grads(optimizer) -> dict:
    """Weight -> gradient of the part that this rank's distributed optimizer holds."""
    weights = optimizer.model_float16_groups + optimizer.model_fp32_groups
    shards = optimizer.shard_fp32_from_float16_groups + optimizer.shard_fp32_groups
    return {
        weight: shard.grad
        for group, shard_group in zip(weights, shards, strict=True)
        for weight, shard in zip(group, shard_group, strict=True)
    }


@torch.no_grad()
def logical_norms(layers: list[HMoEExperts], shards: dict | None, optimizer) -> list[torch.Tensor]:
    """Norms, one scalar a matrix, that this rank adds to the gradient norm; their squares over all ranks are the whole.

    ``shards``: gradients by weight where an optimizer of several ranks shares a matrix, None where each has all of its
    own. A matrix that one rank has whole counts with its fp32 norm as in Megatron; parts are added up in fp64, in which
    the square of an fp32 number is exact, and rounded once.
    """
    ep_group = layers[0].ep_group
    squares = torch.zeros(
        len(layers), layers[0].config.num_moe_experts, 2, dtype=torch.float64, device=torch.cuda.current_device()
    )
    places, grads = [], []
    for index, layer in enumerate(layers):
        for piece in layer.pieces:
            for matrix, weight in enumerate((piece.linear_fc1_weight, piece.linear_fc2_weight)):
                grad = getattr(weight, "main_param", weight).grad if shards is None else shards.get(weight)
                if grad is not None:
                    places.append((index, piece.expert, matrix))
                    grads.append(grad)
    if grads:
        norms = torch.stack(torch._foreach_norm(grads, 2, dtype=None if shards is None else torch.float64))
        squares.index_put_(tuple(torch.tensor(places, device=squares.device).t()), norms.double().square(), True)
    groups = [ep_group] if shards is None else [optimizer.data_parallel_group, ep_group]
    for group in groups:
        torch.distributed.all_reduce(squares, group=group)
    if shards is not None and optimizer.data_parallel_group.rank() > 0:
        return []
    experts = torch.arange(squares.shape[1]).tensor_split(ep_group.size())[ep_group.rank()]
    return list(squares[:, experts.to(squares.device)].sqrt().float().flatten().unbind())
