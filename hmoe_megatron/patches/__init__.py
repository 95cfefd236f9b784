"""Everything that is changed in Megatron and torch, in one list (`tools/doctor.py` prints it).

    cpu_*   what Megatron needs of a machine without a GPU: stand-ins for CUDA, gloo's gaps
    fix_*   defects of Megatron 0.19.2 that every machine has
    as_if_* what a configuration for GPUs needs to be checked where there is none
    hooks   where the run's own code goes into Megatron's, which has no seam there

`apply` runs the first kind, `fix` the second; the features install their hooks. A new Megatron is checked here.
"""

import importlib

from hmoe_megatron import machine
from hmoe_megatron.patches import registry

_MODULES = (
    "as_if_gpu cpu_async_save cpu_cuda cpu_gloo cpu_megatron fix_dataset_helpers fix_latent_attention "
    "fix_latent_experts fix_learning_rate fix_optimizer_checkpoints fix_rerun_mode fix_rng_of_ranks "
    "fix_sequence_parallel_norm fix_torch_adam hooks"
).split()


def listed() -> dict[str, registry.Patch]:
    """{name: Patch} of all patches, whether or not they run on this machine. Does not import Megatron."""
    for module in _MODULES:
        importlib.import_module(f"hmoe_megatron.patches.{module}")
    return dict(registry.PATCHES)


def apply() -> bool:
    """Let Megatron train without a GPU, on the CPU with gloo. Returns whether the process now runs so: False, and
    nothing changed, where there is a GPU. May come before or after Megatron is imported, and must come before its first
    process group or model."""
    needed = not machine.has_gpu()
    if needed:
        _run("cpu")
    return needed


def fix() -> None:
    """Repair what this Megatron gets wrong. Must come before its first optimizer or dataset."""
    _run("fix")


def _run(kind: str) -> None:
    for patch in listed().values():
        if patch.kind == kind:
            patch.run()
