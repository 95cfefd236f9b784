"""Stand-ins on gloo for what only a GPU has: DeepEP's and HybridEP's exchange, and attention under context parallelism.

They follow the interfaces as Megatron 0.19.2 calls them, so that on a CPU everything around the kernels is run: slots,
expert counts, batches, losses. Legend: T tokens of this rank, H hidden size, K slots a token, S slots, L of them here.
"""

import copy

import torch
from megatron.core import mpu
from megatron.core.models import backends
from megatron.core.tensor_parallel import (
    gather_from_sequence_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.moe import token_dispatcher

from hmoe_megatron import validate_args as refusals
from hmoe_megatron.machine import flags as host_flags
from tests.distributed.training_run import steps

HYBRIDEP_SLOTS = []  # local slots of every call: one buffer serves all layers


def deepep_dispatch(x_TH, slots_TK, probs_TK, num_slots, group, async_finish=False, allocate_on_comm_stream=False):
    """A token goes once to each rank that has a slot of it; slots of other ranks arrive as -1, with probability 0."""
    assert probs_TK.dtype == torch.float32 and slots_TK.shape[1] <= num_slots
    here = num_slots // group.size()
    first, all_slots = group.rank() * here, gather_from_sequence_parallel_region(slots_TK, group=group)
    local, slots = (all_slots >= first) & (all_slots < first + here), all_slots - first
    arrive = local.any(dim=1)
    x = gather_from_sequence_parallel_region(x_TH, group=group)[arrive]
    probs = (gather_from_sequence_parallel_region(probs_TK, group=group) * local)[arrive]
    slots = slots.masked_fill(~local, -1)[arrive]
    handle = arrive.nonzero().squeeze(1), len(arrive)
    return x, slots, probs, torch.bincount(slots[slots >= 0], minlength=here), handle


def deepep_combine(x, group, handle, async_finish=False, allocate_on_comm_stream=False):
    return _sum_over_ranks(x, *handle, group), None


def hybridep_dispatch(x, routing_map, probs, group, num_local_experts, pad_multiple=None, **unused):
    """Rows of the local slots, sorted by slot."""
    assert pad_multiple is None and probs.dtype == torch.float32
    HYBRIDEP_SLOTS.append(num_local_experts)
    local = slice(group.rank() * num_local_experts, (group.rank() + 1) * num_local_experts)
    map_TL = gather_from_sequence_parallel_region(routing_map.int(), group=group)[:, local]
    slots, tokens = map_TL.t().nonzero(as_tuple=True)
    x = gather_from_sequence_parallel_region(x, group=group)[tokens]
    probs = gather_from_sequence_parallel_region(probs, group=group)[:, local][tokens, slots]
    return x, probs, None, map_TL.sum(dim=0), (tokens, len(map_TL))


def hybridep_combine(x, handle, num_permuted_tokens, pad_multiple=None, fused=False):
    assert len(x) == num_permuted_tokens
    return _sum_over_ranks(x, *handle, mpu.get_expert_tensor_and_model_parallel_group())


def _sum_over_ranks(x, tokens, num_tokens, group):
    """Rows added up by token; each rank gets its own of the group's tokens."""
    whole = x.new_zeros(num_tokens, x.shape[1]).index_add(0, tokens, x)
    return reduce_scatter_to_sequence_parallel_region(whole, group=group)


class GatheredAttention(DotProductAttention):
    """Local attention over the whole sequence on every context-parallel rank, of which it keeps its own positions."""

    def __init__(self, config, *args, **kwargs):
        config = copy.copy(config)
        config.context_parallel_size = 1
        super().__init__(config, *args, **kwargs)
        self.group = mpu.get_context_parallel_group()

    def forward(self, query, key, value, attention_mask, **kwargs):
        size, rank = self.group.size(), self.group.rank()
        # A rank has the r-th chunk of the sequence from its start and from its end.
        order = [chunk for r in range(size) for chunk in (r, 2 * size - 1 - r)]
        natural = [order.index(chunk) for chunk in range(2 * size)]

        def whole(x):
            chunks = gather_from_sequence_parallel_region(x, group=self.group).chunk(2 * size)
            return torch.cat([chunks[i] for i in natural])

        chunks = super().forward(whole(query), whole(key), whole(value), attention_mask, **kwargs).chunk(2 * size)
        return torch.cat([chunks[rank], chunks[2 * size - 1 - rank]])


def steps_with_standins(flags, **kwargs):
    """`steps`, with the stand-ins in place and the refusals that they stand in for out of it."""
    for flag in ("--moe-token-dispatcher-type", "--context-parallel-size"):
        del host_flags.LIMITED[flag]
    stock_tensor = torch.tensor  # pins memory for the positions of a context-parallel rank
    torch.tensor = lambda *args, pin_memory=False, **kwargs: stock_tensor(*args, **kwargs)
    refusals._gpu_kernel_problems = lambda args: []
    token_dispatcher.set_deepep_num_sms = lambda count: None
    token_dispatcher.fused_dispatch, token_dispatcher.fused_combine = deepep_dispatch, deepep_combine
    token_dispatcher.hybrid_ep_dispatch, token_dispatcher.hybrid_ep_combine = hybridep_dispatch, hybridep_combine
    backends.LocalSpecProvider.core_attention = lambda self: GatheredAttention
    result = steps(flags, **kwargs)
    result["hybridep_slots"] = sorted(set(HYBRIDEP_SLOTS))
    return result
