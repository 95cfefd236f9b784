"""Stand-ins for what Megatron asks of torch.cuda. `torch.cuda.is_available()` stays False: it is the
truth."""

import functools
import os
import resource
import sys
import time
from types import SimpleNamespace

import psutil
import torch
from torch.utils._device import _device_constructors

from hmoe_megatron.patches.registry import patch, replace

CPU = torch.device("cpu")


@patch("cpu")
def cuda_device_is_the_cpu():
    """Megatron builds tensors on torch.cuda.current_device() and starts model parallelism only where
    device_count() > 0. One rank, one device: as many as ranks on this machine."""
    replace(torch.cuda, "current_device", lambda: CPU)
    replace(torch.cuda, "device_count", lambda: int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    replace(torch.cuda, "set_device", lambda device: None)


@patch("cpu")
def cuda_device_properties():
    """validate_args compares the architecture of the device for tensor parallelism. 0.0 is older than any
    GPU."""
    replace(
        torch.cuda,
        "get_device_properties",
        lambda device=None: SimpleNamespace(
            name="cpu",
            major=0,
            minor=0,
            total_memory=psutil.virtual_memory().total,
            multi_processor_count=os.cpu_count(),
        ),
    )


@patch("cpu")
def cuda_streams():
    """DDP, dispatchers and timers order work by streams and events. A CPU does it in the order it was
    asked."""
    stream = Stream()
    replace(torch.cuda, "Stream", Stream)
    replace(torch.cuda, "Event", Event)
    replace(torch.cuda, "current_stream", lambda device=None: stream)
    replace(torch.cuda, "synchronize", lambda device=None: None)
    replace(torch.cuda, "is_current_stream_capturing", lambda: False)
    replace(torch.Tensor, "record_stream", lambda self, stream: None)


class Stream:
    """The one queue of a CPU."""

    cuda_stream = 0
    device = CPU

    def __init__(self, device=None, priority=0):
        pass

    def wait_stream(self, stream):
        pass

    def wait_event(self, event):
        pass

    def synchronize(self):
        pass

    def query(self):
        return True

    def record_event(self, event=None):
        event = event or Event()
        event.record(self)
        return event


class Event:
    """A point in time."""

    def __init__(self, enable_timing=False, blocking=False, interprocess=False, external=False):
        self.recorded_at_s = None

    def record(self, stream=None):
        self.recorded_at_s = time.perf_counter()

    def wait(self, stream=None):
        pass

    def synchronize(self):
        pass

    def query(self):
        return True

    def elapsed_time(self, end):
        """Milliseconds from this event to `end`. ValueError where one was not recorded."""
        if self.recorded_at_s is None or end.recorded_at_s is None:
            raise ValueError("elapsed_time needs both events recorded")
        return (end.recorded_at_s - self.recorded_at_s) * 1e3


@patch("cpu")
def cuda_memory():
    """Megatron's memory reports read torch.cuda: give them the memory of this process, not zeros or an error.
    memory_allocated, memory_reserved and their maxima are computed from memory_stats."""
    for owner in (torch.cuda, torch.cuda.memory):
        replace(owner, "memory_stats", _memory_stats)
    replace(torch.cuda, "device_memory_used", lambda device=None: psutil.virtual_memory().used)


def _memory_stats(device=None):
    resident_bytes = psutil.Process().memory_info().rss
    peak_bytes = max(
        resident_bytes, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    )
    stats = {
        f"{kind}_bytes.all.{when}": value
        for kind in ("allocated", "reserved")
        for when, value in (("current", resident_bytes), ("peak", peak_bytes))
    }
    return stats | {"allocation.all.current": 0}


@patch("cpu")
def cuda_rng():
    """Megatron seeds, saves and forks the generator of the device. Without a GPU torch.cuda.manual_seed is
    put off for ever and get_rng_state raises; here the device's generator is the CPU's."""
    for owner in (torch.cuda, torch.cuda.random):
        replace(owner, "manual_seed", lambda seed: torch.default_generator.manual_seed(int(seed)))
        replace(owner, "get_rng_state", lambda device="cuda": torch.get_rng_state())
        replace(owner, "set_rng_state", lambda new_state, device="cuda": torch.set_rng_state(new_state))


@patch("cpu")
def cuda_factories():
    """Megatron writes device="cuda" in these factories, in optimizers, schedules, logging and checkpoints."""
    # The set of factories that `with torch.device(...)` redirects is built at its first use, and must hold
    # the originals.
    _device_constructors()
    for name in ("empty", "empty_like", "ones", "tensor", "zeros"):
        replace(torch, name, _on_cpu(getattr(torch, name)))


def _on_cpu(factory):
    @functools.wraps(factory)
    def build(*args, **kwargs):
        if kwargs.get("device") is not None and torch.device(kwargs["device"]).type == "cuda":
            kwargs["device"] = CPU
        return factory(*args, **kwargs)

    return build


@patch("cpu")
def tensor_cuda():
    """Megatron calls .cuda() on modules (which call it on their tensors), batches and optimizer states."""
    replace(torch.Tensor, "cuda", lambda self, *args, **kwargs: self)


@patch("cpu")
def tensor_type():
    """Optimizers and gradient clipping compare Tensor.type() with 'torch.cuda.FloatTensor' and refuse
    others."""
    stock = torch.Tensor.type

    def type(self, *args, **kwargs):
        named = stock(self, *args, **kwargs)
        return named.replace("torch.", "torch.cuda.", 1) if isinstance(named, str) else named

    replace(torch.Tensor, "type", type)
