"""Measures the machine at hand: one process for its compute, several under torchrun for its links too."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.distributed as dist

from hmoe_megatron import machine
from hmoe_megatron.moe.compute.choice import ExpertShapes, choose_compute
from hmoe_megatron.placement.profiles import Profile
from hmoe_megatron.tools.calibration.cpu import cpu_name
from hmoe_megatron.tools.calibration.fit import FITTED, errors, fit_profile
from hmoe_megatron.tools.calibration.layers import Layer, experts_run
from hmoe_megatron.tools.calibration.links import measure_links
from hmoe_megatron.tools.calibration.timing import least_times, timer

LINKS = {"intra_node_bytes_per_s": "link inside a node", "inter_node_bytes_per_s": "link across nodes"}


@dataclass(frozen=True)
class Measured:
    """A profile; times_s of the layers kept apart; errors: predicted over measured, minus 1, by what was timed."""

    profile: Profile
    times_s: np.ndarray
    errors: dict[str, np.ndarray]


def measure(fit: Sequence[Layer], apart: Sequence[Layer], seconds: float) -> Measured:
    """Times expert compute for `seconds`, then all-to-all if torch.distributed has two ranks or more.

    All ranks call it, compute at the same time, and return the same; a time is the mean over ranks. fp32 on one thread
    of a CPU, as training there, bf16 on a GPU. Links that the job does not have stay None in the profile.
    """
    on_gpu = machine.has_gpu()
    device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
    dtype = torch.bfloat16 if on_gpu else torch.float32
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    hidden_size = max(layer.hidden_size for layer in fit)
    links = measure_links(hidden_size, device, dtype) if ranks > 1 else (None, None)
    widths = frozenset(layer.widths for layer in (*fit, *apart))
    compute, _ = choose_compute("auto", on_gpu, ExpertShapes(hidden_size, dtype, widths))
    times_s = least_times(
        [experts_run(layer, compute, device, dtype) for layer in (*fit, *apart)], seconds, timer(device)
    )
    if ranks > 1:
        times = torch.tensor(times_s, device=device)
        dist.all_reduce(times)
        times_s = times.cpu().numpy() / ranks
    fit_s, apart_s = times_s[: len(fit)], times_s[len(fit) :]
    profile = fit_profile(fit, fit_s, f"measured on {_machine(device)}", dtype.itemsize)
    found = {"layers fit": errors(fit, fit_s, profile), "layers kept apart": errors(apart, apart_s, profile)}
    rates, sources = {}, dict.fromkeys(FITTED, _source(len(fit), "layers", found["layers kept apart"], ranks))
    for (rate, what), link in zip(LINKS.items(), links, strict=True):
        if link:
            found |= {f"{what}, fit": link.errors, f"{what}, kept apart": link.errors_apart}
            rates[rate] = link.bytes_per_s
            sources[rate] = _source(len(link.errors), "all-to-alls", link.errors_apart, ranks)
    return Measured(replace(profile, sources=sources, **rates), apart_s, found)


def _source(cases: int, what: str, errors_apart: np.ndarray, ranks: int) -> str:
    return (
        f"fit to {cases} {what} timed by tools/profile_hardware.py, {ranks} rank(s), torch {torch.__version__}; "
        f"median error of those kept apart {np.median(np.abs(errors_apart)):.1%}"
    )


def _machine(device: torch.device) -> str:
    """Name of the device."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return cpu_name()
