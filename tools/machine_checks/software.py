"""Probes of the software: each takes no argument and returns a Finding."""

from __future__ import annotations

import functools
import importlib.metadata
import os
import re
import shutil
import sys

from hmoe_megatron.machine.fused_kernels import (
    APEX,
    ENGINE_PARTS,
    Kernels,
    can_compile,
    engine_files,
    extension_modules,
    found_at,
    implementation,
    installed,
    summary,
    switched_off,
)
from hmoe_megatron.tools.machine_checks import machine
from hmoe_megatron.tools.machine_checks.finding import INSTALL, Finding, ask_python, fail, ok, warn

MIN_PYTHON = (3, 12)
REINSTALL = f"rm -rf .venv, then {INSTALL}"
NO_TORCH = "repair torch first, see there"
# Versions, driver and names of GPUs are torch's own report. Ours: which backends there are, whether each GPU works.
TORCH = """
import torch, torch.distributed as dist
from torch.utils import collect_env
answer.update(environment=collect_env.get_env_info()._asdict(), gpus=0, nccl="", gpu_error="")
answer["gloo"] = dist.is_available() and dist.is_gloo_available()
if dist.is_available() and dist.is_nccl_available():
    answer["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
try:
    for i in range(torch.cuda.device_count()):
        torch.ones(1, device=f"cuda:{i}").sum().item()
        answer["gpus"] += 1
except Exception as e:
    answer["gpu_error"] = str(e).splitlines()[0]
"""
MEGATRON = """
import warnings; warnings.simplefilter("ignore")
import megatron.core, megatron.training
answer.update(version=megatron.core.__version__, path=megatron.core.__path__[0])
"""
PATCHES = """
from hmoe_megatron import machine, patches
answer.update({
    name: f"({patch.kind}) {patch.reason}"
    for name, patch in patches.listed().items()
    if patch.kind != "cpu" or not machine.has_gpu()
})
"""


def probe_python() -> Finding:
    found = f"{sys.version.split()[0]} at {sys.executable}"
    if sys.version_info < MIN_PYTHON:
        return fail(found, f"needs 3.12 or later: {INSTALL}, then .venv/bin/python")
    return ok(found)


def probe_requirements() -> Finding:
    """Installed versions against the ranges in setup.py, read from this package's metadata."""
    try:
        wanted = importlib.metadata.requires("hmoe-megatron") or []
    except importlib.metadata.PackageNotFoundError:
        return warn("hmoe-megatron is not installed in this Python", INSTALL)
    try:
        from packaging.requirements import Requirement
    except ImportError:
        return fail("packaging is missing", INSTALL)
    wrong = []
    for requirement in map(Requirement, wanted):
        if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
            continue
        version = installed(requirement.name)
        if version is None or not requirement.specifier.contains(version, prereleases=True):
            wrong.append(f"{requirement.name}{requirement.specifier} (has {version or 'none'})")
    if wrong:
        return fail("unmet: " + ", ".join(wrong), INSTALL)
    return ok(f"what hmoe-megatron {installed('hmoe-megatron')} requires is installed")


@functools.lru_cache(None)
def torch_facts() -> tuple[dict, str]:
    """What torch says of itself and of the GPUs: (facts, "") or ({}, error)."""
    return ask_python(TORCH)


def probe_torch() -> Finding:
    facts, error = torch_facts()
    if error:
        missing = found_at("torch") is None
        return fail("not installed" if missing else error, INSTALL if missing else REINSTALL)
    cuda = facts["environment"]["cuda_compiled_version"]
    found = f"{facts['environment']['torch_version']}, {f'built for CUDA {cuda}' if cuda else 'built without CUDA'}"
    return ok(found) if facts["gloo"] else fail(f"{found}, without gloo", "install the registry's build of torch")


def probe_gpu() -> Finding:
    facts, error = torch_facts()
    if error:
        return warn("unknown without torch")
    if facts["gpu_error"]:
        return fail(facts["gpu_error"], "match driver, torch's CUDA and GPU; see nvidia-smi")
    listed = (facts["environment"]["nvidia_gpu_models"] or "").strip().replace("\n", ", ")
    found = f"{listed}, driver {facts['environment']['nvidia_driver_version']}, NCCL {facts['nccl'] or 'none'}"
    if not facts["gpus"] and not listed:
        return ok("none")
    if not facts["gpus"]:
        cuda = facts["environment"]["cuda_compiled_version"]
        remedy = "update the driver for torch's CUDA" if cuda else "install a CUDA build of torch"
        hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
        if hidden is not None:
            remedy = f"CUDA_VISIBLE_DEVICES={hidden!r} hides them, or else {remedy}"
        return warn(f"torch can use none of those listed: {found}", remedy)
    return ok(found) if facts["nccl"] else fail(found, "install a build of torch for Linux with CUDA and NCCL")


@functools.lru_cache(None)
def transformer_engine() -> tuple[str, str]:
    """(state, words); state: none, half, broken or whole. See `engine_files`."""
    state, words = engine_files()
    if state != "there":
        return state, words
    _, error = ask_python("import torch, transformer_engine.pytorch")
    return ("broken", f"{words}: {error}") if error else ("whole", words)


def kernels() -> Kernels:
    """What a run on a GPU here would find."""
    state, words = transformer_engine()
    whole = state == "whole"
    return Kernels(words if whole else "", "" if whole else words, extension_modules(), can_compile())


def probe_transformer_engine() -> Finding:
    state, words = transformer_engine()
    if state in ("none", "whole"):
        return ok(f"{words} (optional, for GPUs)" if state == "none" else words)
    parts = " ".join([name for name in ENGINE_PARTS if installed(name)] or ENGINE_PARTS)
    complete = "or complete it where the CUDA toolkit is: pip install --no-build-isolation -e .[te]"
    return warn(f"{words}: not used", f"pip uninstall {parts}; {complete}")


def probe_apex() -> Finding:
    """NVIDIA's Apex is known by its extension amp_C; the registry's apex is a Pyramid toolkit of 2013."""
    home = found_at("apex")
    if found_at(APEX):
        return ok(f"NVIDIA's, with CUDA extensions ({home or 'only amp_C'})")
    if home is None:
        return ok("not installed (optional, for GPUs)")
    if (home / "multi_tensor_apply").is_dir():
        remedy = "build it from NVIDIA's source with --cpp_ext --cuda_ext"
        return warn("NVIDIA's, built without its CUDA extensions: unused", remedy)
    return warn(f"not NVIDIA's but another project of that name, at {home}: not used", "pip uninstall apex")


def probe_megatron() -> Finding:
    # As in a run (machine/optional.py): Megatron does not see what is not whole.
    hidden = [name for name, there in (("transformer_engine", kernels().engine), ("apex", found_at(APEX))) if not there]
    answer, error = ask_python(f"import sys; sys.modules.update(dict.fromkeys({hidden})){MEGATRON}")
    if error:
        return fail(error, NO_TORCH if torch_facts()[1] else INSTALL if "No module named" in error else REINSTALL)
    found = f"{answer['version']} at {answer['path']}"
    release = re.match(r"(\d+)\.(\d+)\.(\d+)", answer["version"])
    if not release or not (0, 19, 2) <= tuple(map(int, release.groups())) < (0, 20, 0):
        return fail(found, "needs >= 0.19.2, < 0.20; is another copy on PYTHONPATH?")
    return ok(found)


@functools.lru_cache(None)
def patches() -> tuple[dict, str]:
    """({name: reason} of the patches of Megatron that a run here uses, "") or ({}, error)."""
    return ask_python(PATCHES)


def probe_patches() -> Finding:
    found, error = patches()
    return warn(error, NO_TORCH) if error else ok(f"{len(found)} of Megatron are in use here")


def probe_mpi() -> Finding:
    launcher = shutil.which("mpirun") or shutil.which("mpiexec")
    version = installed("mpi4py")
    if version is None:
        return ok(f"mpi4py not installed (optional), mpirun {launcher or 'not found'}")
    code = (
        "import mpi4py; mpi4py.rc.initialize = False\nfrom mpi4py import MPI\nanswer['it'] = MPI.Get_library_version()"
    )
    answer, error = ask_python(code, timeout_s=60)
    if error:
        return warn(f"mpi4py {version}: {error}", "pip install mpich, or the system's MPI library")
    library = answer["it"].splitlines()[0].strip("\0 ")[:40]
    found = f"mpi4py {version}, {library}, mpirun {launcher or 'not found'}"
    return ok(found) if launcher else warn(found, "pip install mpich, or put mpirun on PATH")


def run_settings() -> dict:
    """What a run here will use: backend, implementation, fused kernels that are off, optimizer, ranks."""
    gpus = torch_facts()[0].get("gpus", 0)
    if not gpus:
        local = {"backend": "gloo", "implementation": "local", "off": ["all"], "optimizer": "torch"}
        return {**local, "ranks": machine.cpu_ranks()}
    found = kernels()
    return {
        "backend": "nccl",
        "implementation": implementation(found, {}),
        "off": [entry.kernel for entry in switched_off(found, {})],
        "optimizer": "Transformer Engine" if found.engine else "Apex" if APEX in found.modules else "torch",
        "ranks": gpus,
    }


def probe_run() -> Finding:
    if torch_facts()[1]:
        return fail("nothing can run without torch", NO_TORCH)
    use = run_settings()
    on_gpu = use["backend"] == "nccl"
    words = summary(kernels(), {}) if on_gpu else "implementation local, no fused kernels"
    found = f"{use['backend']}, {words}, optimizer {use['optimizer']}, up to {use['ranks']} ranks"
    return ok(found) if use["ranks"] else warn(found, "free memory first")
