"""Which backend computes the experts, by ``--hmoe-gemm-backend`` and by what the device at hand gets right."""

import functools
import os
import time
from functools import partial
from typing import NamedTuple

import torch

from hmoe_megatron import machine
from hmoe_megatron.machine.fused_kernels import found_at
from hmoe_megatron.moe.compute.compute import ExpertCompute
from hmoe_megatron.moe.compute.cpu import cpu_experts
from hmoe_megatron.moe.compute.ragged.tiles import unsupported
from hmoe_megatron.moe.compute.reference import reference_experts

OLDEST = (8, 0)  # compute capability: asynchronous copies and bf16


class ExpertShapes(NamedTuple):
    """What a run will compute: hidden size, dtype, the widths of a rank's pieces, over all ranks and layers, and the
    dtype of the gradients that are added up."""

    hidden: int
    dtype: torch.dtype
    widths: frozenset[tuple[int, ...]]
    grad_dtype: torch.dtype = torch.float32

    def supported(self) -> list[tuple[int, ...]]:
        """Those of ``widths`` that the triton backend takes."""
        return [widths for widths in self.widths if not unsupported(widths, self.hidden, self.dtype)]


class DeviceFailed(ValueError):
    """The device of this rank can't do what the flags ask for. Other ranks may not know."""

    on_every_rank = False


class Activation(NamedTuple):
    """What Megatron's flags change about SwiGLU, see reference_experts."""

    clamp: float | None = None
    offset: float = 0.0


SWIGLU = Activation()


class Chosen(NamedTuple):
    """A backend, and in a few words which and why."""

    compute: ExpertCompute
    words: str


def choose_compute(
    name: str, has_gpu: bool, shapes: ExpertShapes, keep_hidden: bool = False, activation: Activation = SWIGLU
) -> Chosen:
    """The backend of ``--hmoe-gemm-backend``. Raises ValueError for one that this machine should not use."""
    if activation != SWIGLU:
        if name not in ("auto", "reference"):
            raise ValueError(
                f"--hmoe-gemm-backend {name} computes SwiGLU as it is: use reference with "
                "--activation-func-clamp-value or --glu-linear-offset"
            )
        return Chosen(partial(reference_experts, **activation._asdict()), "reference, for its clamp or offset")
    if name == "cpu" and has_gpu:
        raise ValueError("--hmoe-gemm-backend cpu on a machine with a GPU: use auto or reference")
    if name == "cpu" or (name == "auto" and not has_gpu):
        return Chosen(cpu_experts, "cpu")
    if name == "reference":
        return Chosen(reference_experts, "reference")
    if machine.is_assumed():  # nothing will be computed
        return Chosen(cpu_experts, f"triton, if it passes its self-test on the device{_left_out(shapes)}")
    started_s = time.monotonic()
    if lacking := _lacking(has_gpu) or _failing(has_gpu, shapes, keep_hidden):
        if name == "triton":
            raise DeviceFailed(f"--hmoe-gemm-backend triton: {lacking}: use auto or reference")
        return Chosen(reference_experts, f"reference, one expert after the other: {lacking}")
    from hmoe_megatron.moe.compute.ragged.experts import ragged_experts

    checked = f"checked on this device in {time.monotonic() - started_s:.1f} s"
    return Chosen(partial(ragged_experts, keep_hidden=keep_hidden), f"triton, {checked}{_left_out(shapes)}")


def _lacking(has_gpu: bool) -> str:
    """Why this machine can't run the kernels; "" if it can."""
    if not found_at("triton"):
        return "Triton is not installed"
    if os.environ.get("TRITON_INTERPRET") == "1":
        return ""  # Triton's interpreter runs them anywhere, for tests
    if not has_gpu:
        return "this machine has no GPU"
    capability = torch.cuda.get_device_capability(_device())
    if capability < OLDEST:
        return f"compute capability {capability[0]}.{capability[1]} is older than {OLDEST[0]}.{OLDEST[1]}"
    return ""


def _device() -> torch.device:
    """Of this process, before Megatron has set it."""
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


def _failing(has_gpu: bool, shapes: ExpertShapes, keep_hidden: bool) -> str:
    """What the device gets wrong of the run's shapes; "" if nothing."""
    if not shapes.supported():
        return f"it takes none of the layers ({unsupported(min(shapes.widths), shapes.hidden, shapes.dtype)})"
    if not has_gpu:
        return ""
    from hmoe_megatron.moe.compute.ragged.self_test import Variants, alignment

    of = shapes.supported()
    variants = Variants(
        shapes.hidden, shapes.dtype, frozenset(map(alignment, of)), max(map(len, of)), shapes.grad_dtype, keep_hidden
    )
    return _tested(variants, _device())


@functools.cache
def _tested(variants, device) -> str:
    """What the self-test says on this device; once a process. DeviceFailed if the device is not usable after it."""
    from hmoe_megatron.moe.compute.ragged import self_test

    name = str(device)
    try:
        name = torch.cuda.get_device_name(device)
        with torch.cuda.device(device):
            wrong = self_test.self_test(variants, device)
    except Exception as error:  # whatever a compiler or driver says of it
        wrong = first_line(error)
        try:
            torch.cuda.synchronize(device)
        except Exception as after:  # an illegal access stays with the process
            raise DeviceFailed(
                f"the triton kernels broke {name} for this process ({first_line(after)}): "
                "use --hmoe-gemm-backend reference"
            ) from error
    return f"the triton kernels fail on {name}: {wrong}" if wrong else ""


def first_line(error: Exception) -> str:
    """Its type and what it says, in a line."""
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"


def _left_out(shapes: ExpertShapes) -> str:
    """What it leaves to the reference."""
    left = [widths for widths in shapes.widths if unsupported(widths, shapes.hidden, shapes.dtype)]
    if not left:
        return ""
    why = unsupported(min(left), shapes.hidden, shapes.dtype)
    return f"; {len(left)} of {len(shapes.widths)} sets of pieces one after the other: {why} (--hmoe-width-multiple 8)"
