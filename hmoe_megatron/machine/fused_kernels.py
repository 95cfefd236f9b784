"""Which fused kernels a GPU machine has, and which of Megatron's flags follow from that.

The one place for both: training, the tools and the doctor ask here. Standard library only, and nothing that may be
broken is imported: the doctor runs where torch is missing too.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import shutil
from pathlib import Path
from typing import NamedTuple

ENGINE_PARTS = ["transformer-engine", "transformer-engine-cu12", "transformer-engine-cu13", "transformer-engine-torch"]
GRADIENT_ACCUMULATION = ("fused_weight_gradient_mlp_cuda",)
MASKED_SOFTMAX = ("scaled_masked_softmax_cuda", "scaled_upper_triang_masked_softmax_cuda")
# NVIDIA's Apex is known by it; the registry's apex is a Pyramid toolkit of 2013.
APEX = "amp_C"


class Kernels(NamedTuple):
    """engine: version of a whole Transformer Engine, or "" and in no_engine why there is none. modules: those found of
    the extension modules named above. compiler: whether torch.compile can build kernels."""

    engine: str
    no_engine: str
    modules: frozenset[str]
    compiler: bool


class Off(NamedTuple):
    """A flag that switches a kernel off, the kernel, and what would bring it."""

    flag: str
    kernel: str
    remedy: str


def found_at(module: str) -> Path | None:
    """Directory or file of a top-level module, without importing it."""
    try:
        spec = importlib.util.find_spec(module)
    except (ImportError, ValueError):
        return None
    if spec is None:
        return None
    places = list(spec.submodule_search_locations or [])
    return Path(places[0] if places else spec.origin or ".")


def installed(name: str) -> str | None:
    """Version of an installed distribution, without importing it."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def engine_files() -> tuple[str, str]:
    """(state, words) of Transformer Engine's files: "none", "half", or "there", which says nothing of whether it works.

    The core wheel and the torch part are separate packages. With only the first, Transformer Engine raises
    FileNotFoundError, which Megatron does not expect, so `import megatron.core` dies too.
    """
    home = found_at("transformer_engine")
    versions = ", ".join(f"{name} {installed(name)}" for name in ENGINE_PARTS if installed(name))
    if home is None:
        return ("half", f"{versions}, but no module transformer_engine") if versions else ("none", "not installed")
    places = [home.parent, home, home / "wheel_lib"]
    if not any(list(place.glob("transformer_engine_torch*.so")) for place in places):
        return "half", f"{versions or home}, but its torch part is missing"
    return "there", versions or str(home)


def extension_modules() -> frozenset[str]:
    """Those found of Apex's extension modules."""
    return frozenset(name for name in (*GRADIENT_ACCUMULATION, *MASKED_SOFTMAX, APEX) if found_at(name))


def can_compile() -> bool:
    """Whether torch.compile finds what it builds kernels with: Triton and a C compiler for its launchers."""
    return bool(found_at("triton") and any(map(shutil.which, (os.environ.get("CC") or "gcc", "cc", "clang"))))


def implementation(kernels: Kernels, given: dict) -> str:
    """Megatron's --transformer-impl: as ``given``, {flag: value}, says, or by what is there."""
    return given.get("--transformer-impl") or ("transformer_engine" if kernels.engine else "local")


def switched_off(kernels: Kernels, given: dict) -> list[Off]:
    """What Megatron has on by default and can't have here, under the flags of ``given``."""
    off = []
    if not kernels.engine:
        off.append(Off("--no-rope-fusion", "rope", "Transformer Engine"))
    if not kernels.modules.issuperset(GRADIENT_ACCUMULATION):
        # With Transformer Engine too: the output layer is Megatron's own linear.
        off.append(Off("--no-gradient-accumulation-fusion", "gradient accumulation", "NVIDIA's Apex"))
    if implementation(kernels, given) == "local":
        if not kernels.modules.issuperset(MASKED_SOFTMAX):
            off.append(Off("--no-masked-softmax-fusion", "masked softmax", "NVIDIA's Apex"))
        # Apex has no RMSNorm: Megatron then takes torch's norm, which refuses the flag's default.
        if given.get("--normalization") == "RMSNorm" or APEX not in kernels.modules:
            off.append(Off("--no-persist-layer-norm", "persistent norm", "Transformer Engine"))
    if not kernels.compiler:
        off.append(Off("--no-bias-swiglu-fusion", "SwiGLU", "Triton and a C compiler"))
    return off


def summary(kernels: Kernels, given: dict) -> str:
    """What is used on a GPU and why, in one line."""
    found = implementation(kernels, given)
    because = f"Transformer Engine {kernels.engine}" if kernels.engine else f"Transformer Engine: {kernels.no_engine}"
    off = ", ".join(f"{entry.kernel} (needs {entry.remedy})" for entry in switched_off(kernels, given))
    return f"implementation {found} ({because}); fused kernels {f'without {off}' if off else 'all on'}"
