"""Measures the machine at hand: one process for its compute, several under torchrun for its links too."""

import platform
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from hmoe_megatron import host
from hmoe_megatron.gemm import expert_compute
from hmoe_megatron.placement.profiles import Profile
from hmoe_megatron.profiling.fit import errors, fit_profile
from hmoe_megatron.profiling.layers import Layer, experts_run, layers_kept_apart, layers_to_fit
from hmoe_megatron.profiling.links import Link, measure_links
from hmoe_megatron.profiling.timing import least_times, timer


@dataclass(frozen=True)
class Errors:
    """Predicted over measured time, minus 1, of each case that was fit and of each that was kept apart."""

    fit: np.ndarray
    apart: np.ndarray

    def __str__(self):
        return ", ".join(f"{name} median {np.median(np.abs(errors)):.1%}, nine of ten within "
                         f"{np.quantile(np.abs(errors), 0.9):.1%}"
                         for name, errors in (("fit", self.fit), ("kept apart", self.apart)))


@dataclass(frozen=True)
class Measured:
    """A profile and how far off it is: of the layers kept apart, their errors; of each link that was measured, too."""

    profile: Profile
    compute: Errors
    layers_apart: tuple[Layer, ...]
    links: dict[str, Errors]


def measure(hidden_sizes: Sequence[int], rows: Sequence[int], widths: Sequence[int], seconds: float) -> Measured:
    """Times expert compute for `seconds`, then all-to-all if torch.distributed has two ranks or more.

    All ranks call it, compute at the same time, and return the same; a time is the mean over ranks. fp32 on one thread
    of a CPU, as training there, bf16 on a GPU. Links that the job does not have stay None in the profile.
    """
    on_gpu = host.has_gpu()
    device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
    dtype = torch.bfloat16 if on_gpu else torch.float32
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    fit, apart = (make(hidden_sizes, rows, widths) for make in (layers_to_fit, layers_kept_apart))
    compute = expert_compute("auto", on_gpu)
    times_s = least_times([experts_run(layer, compute, device, dtype) for layer in fit + apart], seconds,
                          timer(device))
    if ranks > 1:
        times = torch.tensor(times_s, device=device)
        dist.all_reduce(times)
        times_s = times.cpu().numpy() / ranks
    profile = fit_profile(fit, times_s[:len(fit)], f"measured on {machine(device)}", dtype.itemsize)
    found = Errors(errors(fit, times_s[:len(fit)], profile), errors(apart, times_s[len(fit):], profile))
    links = dict(zip(("intra_node_bytes_per_s", "inter_node_bytes_per_s"),
                     measure_links(max(hidden_sizes), device, dtype) if ranks > 1 else (None, None), strict=True))
    return Measured(_with_links(profile, links, found, ranks), found, tuple(apart),
                    {rate: Errors(link.errors, link.errors_apart) for rate, link in links.items() if link})


def _with_links(profile: Profile, links: dict[str, Link | None], found: Errors, ranks: int) -> Profile:
    how = f"tools/profile_hardware.py, {ranks} ranks, torch {torch.__version__}: {found}"
    sources = dict.fromkeys(("flops_per_s", "launch_s", "activation_bytes_per_s", "row_tile"), how)
    sources |= {rate: "measured" if link else "not measured" for rate, link in links.items()}
    return replace(profile, sources=sources, **{rate: link.bytes_per_s for rate, link in links.items() if link})


def machine(device: torch.device) -> str:
    """Name of the device."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    models = [line.partition(":")[2].strip() for line in info.read_text().splitlines() if line.startswith("model name")
              ] if info.exists() else []
    return models[0] if models else platform.machine()
