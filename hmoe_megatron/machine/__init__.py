"""What a machine has - a GPU, Transformer Engine, Apex, halves of them - and what Megatron needs for it.

machine.prepare_environment()        # first of all, before Megatron is imported
argv = machine.machine_argv(argv)    # the flags that this machine needs, and a refusal of those it cannot have
"""

import functools
import os
import sys

from hmoe_megatron.machine import optional
from hmoe_megatron.machine.flags import cpu_argv, gpu_argv
from hmoe_megatron.machine.fused_kernels import APEX, GRADIENT_ACCUMULATION, MASKED_SOFTMAX, Kernels, summary

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


def assume_gpus(ranks: int) -> None:
    """For `--hmoe-check-only`: from now on this is rank 0 of so many on GPUs that lack nothing."""
    global has_gpu
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(min(ranks, 8))}
    has_gpu = _assumed
    modules = frozenset((*GRADIENT_ACCUMULATION, *MASKED_SOFTMAX, APEX))
    optional.kernels = lambda: Kernels("of the GPU machine", "", modules, True)


def is_assumed() -> bool:
    """Whether there is no GPU of which this process says that there is one."""
    return has_gpu is _assumed


def _assumed() -> bool:
    return True


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
