"""Patches of Megatron itself. Imports Megatron when they run, not before."""

import functools
import queue
import warnings

import torch

from hmoe_megatron.patches.registry import patch, replace


@patch("cpu")
def megatron_without_cuda():
    """initialize_megatron asserts torch.cuda.is_available(), but has an argument to go without, which
    pretrain() does not pass on."""
    import megatron.training.training  # noqa: F401  it takes initialize_megatron by name
    from megatron.training import initialize

    replace(initialize, "initialize_megatron", functools.partial(initialize.initialize_megatron, allow_no_cuda=True))


@patch("cpu")
def no_fusion_warmup():
    """The warm-up of fused kernels runs on device="cuda" and draws random numbers; nothing is fused here."""
    from megatron.training import initialize

    replace(initialize, "_warmup_jit_function", lambda tp_size=None: None)


@patch("cpu")
def megatron_rng_state():
    """Megatron's own setter takes the device's generator from a list that is empty without a GPU, and is put
    off until CUDA starts: it never sets anything."""
    from megatron.core.tensor_parallel import random

    replace(
        random, "_set_cuda_rng_state", lambda new_state, device=-1, graph_safe=False: torch.set_rng_state(new_state)
    )


@patch("cpu")
def permutation_without_a_sort():
    """permute() sorts all pairs of token and expert to find the chosen ones, so that shapes are known to a GPU. On a
    CPU that grows with their product: 66 of the 840 ms of a layer with 256 experts. nonzero() gives the same
    indices."""
    from megatron.core.transformer.moe import moe_utils, token_dispatcher  # noqa: F401  it takes permute by name

    stock = moe_utils.permute

    @functools.wraps(stock)
    def permute(
        tokens,
        routing_map,
        probs=None,
        num_out_tokens=None,
        fused=False,
        drop_and_pad=False,
        tokens_per_expert=None,
        align_size=0,
    ):
        if fused or drop_and_pad:
            return stock(tokens, routing_map, probs, num_out_tokens, fused, drop_and_pad, tokens_per_expert, align_size)
        chosen = routing_map.bool().T.contiguous().view(-1).nonzero().squeeze(1)
        token = chosen % tokens.shape[0]
        permuted_probs = None if probs is None else probs.T.contiguous().view(-1)[chosen]
        return tokens.index_select(0, token), permuted_probs, token, None, tokens_per_expert

    replace(moe_utils, "permute", permute)


@patch("cpu")
def queue_of_a_synchronous_save():
    """A save starts a manager process, which imports the main script again (11 s at the first save on a CPU),
    for a queue between processes. A synchronous save writes in this process: a plain queue does. An
    asynchronous one keeps the manager."""
    from megatron.core.dist_checkpointing.strategies import filesystem_async
    from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy

    stock = TorchDistSaveShardedStrategy.save

    @functools.wraps(stock)
    def save(self, sharded_state_dict, checkpoint_dir):
        shared, filesystem_async._results_queue = filesystem_async._results_queue, queue.Queue()
        try:
            return stock(self, sharded_state_dict, checkpoint_dir)
        finally:
            filesystem_async._results_queue = shared

    replace(TorchDistSaveShardedStrategy, "save", save)


@patch("cpu")
def quiet_pin_memory():
    """Megatron's DataLoader asks for pinned memory, has no flag against it, and torch warns at every
    epoch."""
    replace(warnings, "filters", list(warnings.filters))
    message = "'pin_memory' argument is set as true but no accelerator is found"
    warnings.filterwarnings("ignore", message=message)
