"""Transformer Engine and Apex in this process: whole, or not there for Megatron.

Megatron takes both where it can import them. It dies of a half-installed Transformer Engine, takes another project
called apex for NVIDIA's, and on a CPU would compute with kernels that are not for it.
"""

import functools
import importlib
import sys

from hmoe_megatron.machine import fused_kernels
from hmoe_megatron.machine.fused_kernels import APEX, Kernels


@functools.cache
def kernels() -> Kernels:
    """What this GPU machine has. Imports Transformer Engine if it is there, and torch before it."""
    state, words = fused_kernels.engine_files()
    version = ""
    if state == "there":
        import torch  # noqa: F401  Transformer Engine finds its libraries through it

        try:
            importlib.import_module("transformer_engine.pytorch")
            version = getattr(sys.modules["transformer_engine"], "__version__", "of unknown version")
        except Exception as error:
            words = f"{words}: {type(error).__name__}: {error}".splitlines()[0]
    return Kernels(version, "" if version else words, fused_kernels.extension_modules(), fused_kernels.can_compile())


def hide(*names: str) -> None:
    """Let `import` of these packages say that there are none. They must not be in use yet."""
    for name in names:
        for module in [module for module in sys.modules if module == name or module.startswith(f"{name}.")]:
            del sys.modules[module]
        sys.modules[name] = None


def hide_what_megatron_cannot_use(has_gpu: bool) -> None:
    """Before Megatron is imported."""
    if not has_gpu:
        hide("transformer_engine", "apex")
        return
    found = kernels()
    if not found.engine:
        hide("transformer_engine")
    if APEX not in found.modules:
        hide("apex")
