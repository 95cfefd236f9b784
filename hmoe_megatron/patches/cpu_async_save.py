"""Asynchronous saves on a machine with no GPU: the worker's own process, and the tensors that it is sent."""

import functools
import multiprocessing
from multiprocessing.managers import SyncManager
from typing import NamedTuple

import torch

from hmoe_megatron.child_process import end_with_parent
from hmoe_megatron.patches import cpu_cuda, registry
from hmoe_megatron.patches.registry import patch, replace


@patch("cpu")
def worker_of_asynchronous_saves():
    """The worker is a new process, without these patches: it divides by the number of GPUs and dies, and the run waits
    for it for ever."""
    from megatron.core.dist_checkpointing.strategies.async_utils import PersistentAsyncCaller

    replace(PersistentAsyncCaller, "async_loop", staticmethod(worker_loop))


def worker_loop(*args):
    """Body of the worker: Megatron's, after the two patches that it needs."""
    from megatron.core.dist_checkpointing.strategies.async_utils import PersistentAsyncCaller

    end_with_parent()  # Megatron's loop waits for work for ever where its rank was killed
    cpu_cuda.cuda_device_is_the_cpu()
    cpu_cuda.cuda_streams()
    before = [replaced.before for replaced in registry.REPLACED if replaced.attribute == "async_loop"]
    stock = before[0] if before else PersistentAsyncCaller.async_loop  # a new process, or a fork of one with the patch
    return stock(*args)


@patch("cpu")
def queue_of_asynchronous_saves():
    """The queue's server, a fork of the rank, has no watch of its own: where its rank was killed it stays for ever,
    and holds open what tells the worker that the rank is gone."""
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    def get_write_results_queue(mp_mode="spawn"):
        if filesystem_async._results_queue is None:
            manager = SyncManager(ctx=multiprocessing.get_context(mp_mode))
            manager.start(end_with_parent)
            filesystem_async._results_queue = manager.Queue()
        return filesystem_async._results_queue

    replace(filesystem_async, "get_write_results_queue", get_write_results_queue)


@patch("cpu")
def copies_for_asynchronous_saves():
    """Megatron copies tensors from the GPU before the training loop goes on. One that is in CPU memory it shares with
    the worker, which then writes what later steps have made of it."""
    from megatron.core.dist_checkpointing.strategies.async_utils import PersistentAsyncCaller

    stock = PersistentAsyncCaller.schedule_async_call

    @functools.wraps(stock)
    def schedule_async_call(self, async_req):
        if async_req.preload_fn is not None:
            rank, _, results = async_req.async_fn_args
            sent = _with_tensors(_sent, async_req.preload_fn())
            write = functools.partial(_write_received, async_req.async_fn)
            async_req = async_req._replace(async_fn=write, async_fn_args=[rank, sent, results], preload_fn=None)
        return stock(self, async_req)

    replace(PersistentAsyncCaller, "schedule_async_call", schedule_async_call)


class Sent(NamedTuple):
    """A tensor by value: torch would send a file descriptor for each, and a process may have 1,024 of them."""

    memory: object
    dtype: torch.dtype
    shape: torch.Size


def _sent(tensor):
    return Sent(tensor.reshape(-1).view(torch.uint8).clone().numpy(), tensor.dtype, tensor.shape)


def _received(sent):
    return torch.from_numpy(sent.memory).view(sent.dtype).view(sent.shape)


def _with_tensors(function, buckets):
    """Megatron's write buckets with `function` of their tensors."""
    return [
        (path, key, (of_bytes, [(item, function(tensor)) for item, tensor in of_tensors]))
        for path, key, (of_bytes, of_tensors) in buckets
    ]


def _write_received(write, rank, buckets, results, **kwargs):
    return write(rank, _with_tensors(_received, buckets), results, **kwargs)
