"""What Megatron must be told or spared by what a machine has: no GPU, no Transformer Engine, no Apex, halves of them.

    machine.prepare_environment()        # first of all, before Megatron is imported
    if patches.apply(): ...              # imports Megatron; True where there is no GPU
    argv = machine.machine_argv(argv)    # the flags that this machine needs, and a refusal of those it cannot have

`apply` lets Megatron train without a GPU, on the CPU with gloo, and changes nothing where there is one. It may come
before or after Megatron is imported, and must come before its first process group or model. Beside them stand
`repairs`, `optimizer_repairs` and `rng`: defects of Megatron 0.19.2 that a machine with a GPU has as well.
"""
import functools
import os
import sys

from hmoe_megatron.machine.fused_kernels import summary

from . import optional, registry
from .flags import cpu_argv, gpu_argv
from .optimizer_repairs import repair_optimizer_checkpoints
from .registry import REPLACED
from .repairs import repair_dataset_helpers, repair_distributed_optimizer, repair_sequence_parallel_norm
from .rng import repair_rng_of_ranks

__all__ = ["ENVIRONMENT", "REPLACED", "apply", "has_gpu", "machine_argv", "machine_line", "patches",
           "prepare_environment", "repair_dataset_helpers", "repair_distributed_optimizer",
           "repair_optimizer_checkpoints", "repair_rng_of_ranks", "repair_sequence_parallel_norm"]

_applied = False

# Megatron asks for it with tensor parallelism, whatever the device: kernels then start in the order of their calls.
# CUDA reads it when it starts.
CONNECTIONS = "CUDA_DEVICE_MAX_CONNECTIONS"
ENVIRONMENT = {
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
    """Hide from Megatron what of Transformer Engine and Apex it can't use. Set CONNECTIONS, and without a GPU
    ENVIRONMENT, where the user did not, for this process and those it starts."""
    os.environ.setdefault(CONNECTIONS, "1")
    optional.hide_what_megatron_cannot_use(has_gpu())
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


def machine_argv(argv):
    """`argv` (no program name) with the flags that Megatron needs on this machine put before the user's.

    ValueError where the user gave a flag that needs what is not here."""
    return gpu_argv(argv, optional.kernels()) if has_gpu() else cpu_argv(argv)


def machine_line(args):
    """What this machine computes with, in one line. args: Megatron's arguments."""
    if not has_gpu():
        return "no GPU found: training on the CPU with gloo, implementation local, no fused kernels"
    given = {"--transformer-impl": args.transformer_impl, "--normalization": args.normalization}
    return summary(optional.kernels(), given)
