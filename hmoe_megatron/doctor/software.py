"""Probes of the software: each takes no argument and returns a Finding."""

from __future__ import annotations

import functools
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys

from hmoe_megatron.machine.fused_kernels import (
    APEX,
    ENGINE_PARTS,
    Kernels,
    can_compile,
    engine_files,
    extension_modules,
    found_at,
    installed,
)

from .finding import GIB, INSTALL, Finding, ask_python

MIN_PYTHON = (3, 12)


def probe_python() -> Finding:
    found = f"{sys.version.split()[0]} at {sys.executable}"
    if sys.version_info < MIN_PYTHON:
        return Finding("fail", "python", found, f"needs 3.12 or later: {INSTALL}, then .venv/bin/python")
    return Finding("ok", "python", found)


def probe_requirements() -> Finding:
    """Installed versions against the ranges in setup.py, read from this package's metadata."""
    try:
        wanted = importlib.metadata.requires("hmoe-megatron") or []
    except importlib.metadata.PackageNotFoundError:
        return Finding("warn", "packages", "hmoe-megatron is not installed in this Python", INSTALL)
    try:
        from packaging.requirements import Requirement
    except ImportError:
        return Finding("fail", "packages", "packaging is missing", INSTALL)
    wrong = []
    for requirement in map(Requirement, wanted):
        if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
            continue
        version = installed(requirement.name)
        if version is None or not requirement.specifier.contains(version, prereleases=True):
            wrong.append(f"{requirement.name}{requirement.specifier} (has {version or 'none'})")
    if wrong:
        return Finding("fail", "packages", "unmet: " + ", ".join(wrong), INSTALL)
    return Finding("ok", "packages", f"what hmoe-megatron {installed('hmoe-megatron')} requires is installed")


@functools.lru_cache(None)
def torch_facts() -> tuple[dict, str]:
    """What torch says of itself and of the GPUs: (facts, "") or ({}, error)."""
    return ask_python(
        "import torch, torch.distributed as dist\n"
        "answer.update(version=torch.__version__, cuda=torch.version.cuda)\n"
        "answer.update(gpus=[], nccl=None, gpu_error='')\n"
        "answer['gloo'] = dist.is_available() and dist.is_gloo_available()\n"
        "if dist.is_available() and dist.is_nccl_available():\n"
        "    answer['nccl'] = '.'.join(map(str, torch.cuda.nccl.version()))\n"
        "try:\n"
        "    for i in range(torch.cuda.device_count()):\n"
        "        torch.ones(1, device=f'cuda:{i}').sum().item()\n"
        "        p = torch.cuda.get_device_properties(i)\n"
        "        answer['gpus'].append(dict(name=p.name, capability=f'{p.major}.{p.minor}',"
        " bytes=p.total_memory))\n"
        "except Exception as e:\n"
        "    answer['gpu_error'] = str(e).splitlines()[0]\n"
    )


def probe_torch() -> Finding:
    facts, error = torch_facts()
    if error:
        missing = found_at("torch") is None
        remedy = INSTALL if missing else f"rm -rf .venv, then {INSTALL}"
        return Finding("fail", "torch", "not installed" if missing else error, remedy)
    found = f"{facts['version']}, " + (
        f"built for CUDA {facts['cuda']}" if facts["cuda"] else "built without CUDA"
    )
    if not facts["gloo"]:
        return Finding("fail", "torch", found + ", without gloo", "install the registry's build of torch")
    return Finding("ok", "torch", found)


def gpu_is_present() -> bool:
    """Whether the driver sees a GPU, whatever torch thinks."""
    if shutil.which("nvidia-smi") is None:
        return False
    try:
        listed = subprocess.run(
            ["nvidia-smi", "-L"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            timeout=30,
            encoding="utf-8",
            errors="replace",
        )
    except (OSError, subprocess.TimeoutExpired):
        return False
    return listed.returncode == 0 and "GPU " in listed.stdout


def probe_gpu() -> Finding:
    facts, error = torch_facts()
    if error:
        return Finding("warn", "gpu", "cannot be told without torch")
    if facts["gpu_error"]:
        return Finding(
            "fail", "gpu", facts["gpu_error"], "match driver, torch's CUDA and GPU; see nvidia-smi"
        )
    if not facts["gpus"]:
        if not gpu_is_present():
            return Finding("ok", "gpu", "none")
        remedy = "update the driver for torch's CUDA" if facts["cuda"] else "install a CUDA build of torch"
        hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
        if hidden is not None:
            remedy = f"CUDA_VISIBLE_DEVICES={hidden!r} hides them, or else {remedy}"
        return Finding("warn", "gpu", "nvidia-smi lists GPUs, torch can use none", remedy)
    kinds: dict[str, int] = {}
    for gpu in facts["gpus"]:
        kind = f"{gpu['name']} (capability {gpu['capability']}, {gpu['bytes'] / GIB:.0f} GiB)"
        kinds[kind] = kinds.get(kind, 0) + 1
    return Finding("ok", "gpu", ", ".join(f"{count} x {kind}" for kind, count in kinds.items()))


def probe_nccl() -> Finding:
    facts, error = torch_facts()
    if error:
        return Finding("warn", "nccl", "cannot be told without torch")
    if facts["nccl"]:
        return Finding("ok", "nccl", facts["nccl"] + ("" if facts["gpus"] else ", idle without a GPU"))
    if facts["gpus"]:
        return Finding(
            "fail", "nccl", "this build of torch has none", "install a CUDA build of torch for Linux"
        )
    return Finding("ok", "nccl", "none; gloo needs no GPU")


@functools.lru_cache(None)
def transformer_engine() -> tuple[str, str]:
    """(state, words); state: none, half, broken or whole. See ``engine_files``."""
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
    if state == "none":
        return Finding("ok", "transformer-engine", "not installed (optional, for GPUs)")
    if state == "whole":
        return Finding("ok", "transformer-engine", words)
    parts = [name for name in ENGINE_PARTS if installed(name)] or ENGINE_PARTS
    return Finding(
        "warn",
        "transformer-engine",
        f"{words}: not used",
        f"pip uninstall {' '.join(parts)}; or complete it where the CUDA toolkit is: "
        "pip install --no-build-isolation -e .[te]",
    )


def probe_apex() -> Finding:
    """NVIDIA's Apex is known by its extension amp_C; the registry's apex is a Pyramid toolkit of 2013."""
    home = found_at("apex")
    if found_at(APEX):
        return Finding("ok", "apex", f"NVIDIA's, with CUDA extensions ({home or 'only amp_C'})")
    if home is None:
        return Finding("ok", "apex", "not installed (optional, for GPUs)")
    if (home / "multi_tensor_apply").is_dir():
        return Finding(
            "warn",
            "apex",
            "NVIDIA's, built without its CUDA extensions: unused",
            "build it from NVIDIA's source with --cpp_ext --cuda_ext",
        )
    found = f"not NVIDIA's but another project of that name, at {home}: not used"
    return Finding("warn", "apex", found, "pip uninstall apex")


def megatron_remedy(error: str) -> str:
    if torch_facts()[1]:
        return "mend torch first, see there"
    return INSTALL if "No module named" in error else f"rm -rf .venv, then {INSTALL}"


def probe_megatron() -> Finding:
    # As in a run (host/optional.py): Megatron does not see what is not whole.
    hidden = [name for name, there in (("transformer_engine", kernels().engine), ("apex", found_at(APEX))) if not there]
    answer, error = ask_python(
        f"import sys; sys.modules.update(dict.fromkeys({hidden}))\n"
        "import warnings; warnings.simplefilter('ignore')\n"
        "import megatron.core, megatron.training\n"
        "answer.update(version=megatron.core.__version__, path=megatron.core.__path__[0])"
    )
    if error:
        return Finding("fail", "megatron-core", error, megatron_remedy(error))
    found = f"{answer['version']} at {answer['path']}"
    release = re.match(r"(\d+)\.(\d+)\.(\d+)", answer["version"])
    if not release or not (0, 19, 2) <= tuple(map(int, release.groups())) < (0, 20, 0):
        return Finding(
            "fail", "megatron-core", found, "needs >= 0.19.2, < 0.20; is another copy on PYTHONPATH?"
        )
    return Finding("ok", "megatron-core", found)


def probe_mpi() -> Finding:
    launcher = shutil.which("mpirun") or shutil.which("mpiexec")
    version = installed("mpi4py")
    if version is None:
        words = f"mpi4py not installed (optional), mpirun {launcher or 'not found'}"
        return Finding("ok", "mpi", words)
    answer, error = ask_python(
        "import mpi4py; mpi4py.rc.initialize = False\n"
        "from mpi4py import MPI; answer['library'] = MPI.Get_library_version()"
        ".split('\\n')[0].strip('\\0 ')[:40]",
        timeout_s=60,
    )
    if error:
        return Finding(
            "warn", "mpi", f"mpi4py {version}: {error}", "pip install mpich, or the system's MPI library"
        )
    found = f"mpi4py {version}, {answer['library']}"
    if launcher is None:
        return Finding(
            "warn", "mpi", found + ", mpirun not found", "pip install mpich, or put mpirun on PATH"
        )
    return Finding("ok", "mpi", f"{found}, {launcher}")
