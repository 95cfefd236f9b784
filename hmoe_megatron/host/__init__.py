"""The only module that knows a machine may have no GPU: it lets Megatron train there, on CPU with gloo.

    host.prepare_environment()        # first of all, cheap
    if host.apply(): ...              # imports Megatron; True where there is no GPU
    argv = host.cpu_argv(argv)        # the flags that a CPU needs, and a refusal of those it cannot have

On a machine with a GPU none of these changes anything. `apply` may come before or after Megatron is imported,
and must come before its first process group or model. Beside them stand `repairs`, `optimizer_repairs` and `rng`:
defects of Megatron 0.19.2 that a machine with a GPU has as well.
"""
import functools
import os
import sys

from . import registry
from .flags import cpu_argv as _cpu_argv
from .optimizer_repairs import repair_optimizer_checkpoints
from .registry import REPLACED
from .repairs import repair_dataset_helpers, repair_distributed_optimizer
from .rng import repair_rng_of_ranks

__all__ = ["ENVIRONMENT", "REPLACED", "apply", "cpu_argv", "has_gpu", "patches", "prepare_environment",
           "repair_dataset_helpers", "repair_distributed_optimizer", "repair_optimizer_checkpoints",
           "repair_rng_of_ranks"]

_applied = False

ENVIRONMENT = {
    # Megatron asks for it with tensor parallelism, whatever the device.
    "CUDA_DEVICE_MAX_CONNECTIONS": "1",
    # Megatron compiles small functions with torch.compile; on a CPU that needs a C++ compiler and minutes.
    "TORCHDYNAMO_DISABLE": "1",
    # Ranks share the cores.
    "OMP_NUM_THREADS": "1",
}


@functools.cache
def has_gpu():
    """True where torch finds a GPU it can use. Asked once a process."""
    import torch
    return torch.cuda.is_available()


def prepare_environment():
    """Set ENVIRONMENT where the user did not, for this process and those it starts. Nothing where there is a
    GPU."""
    if has_gpu():
        return
    unset = [name for name in ENVIRONMENT if name not in os.environ]
    os.environ.update({name: ENVIRONMENT[name] for name in unset})
    # torch has read both variables if it was there before.
    if "OMP_NUM_THREADS" in unset:
        import torch
        torch.set_num_threads(int(ENVIRONMENT["OMP_NUM_THREADS"]))
    if "TORCHDYNAMO_DISABLE" in unset and "torch._dynamo" in sys.modules:
        sys.modules["torch._dynamo"].config.disable = True


def patches():
    """{name: its reason} of every patch, whether or not they run on this machine. Does not import
    Megatron."""
    from . import async_save, cuda, gloo, megatron  # noqa: F401  registers them
    return {name: " ".join(function.__doc__.split()) for name, function in registry.PATCHES.items()}


def apply():
    """Run every patch, once a process. Returns whether the process now stands on them: False, and nothing
    changed, where there is a GPU."""
    global _applied
    if has_gpu():
        return False
    if not _applied:
        for name in patches():
            registry.run(name)
        _applied = True
    return True


def cpu_argv(argv):
    """`argv` (no program name) with the flags that Megatron needs without a GPU put before the user's.

    ValueError where the user gave a flag that needs a GPU. Unchanged where there is one."""
    return list(argv) if has_gpu() else _cpu_argv(argv)
