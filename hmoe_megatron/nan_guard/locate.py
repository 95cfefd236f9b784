"""Which weight, module, expert, decoder layer (from 0) and rank a NaN or an infinity came from.

Only asked after a step has failed, so nothing here is in the hot path. Legend: R routed rows, H hidden size.
"""

import os
from typing import NamedTuple

import torch
from megatron.core.utils import unwrap_model

# Kinds of findings, the nearest to the origin first.
WEIGHTS, MODULE, LOGITS, ARRIVED, GRADIENTS, CHECK = range(6)


class Finding(NamedTuple):
    """What one rank saw. ``order``: (kind, then what came first); the smallest over all ranks is the cause."""

    order: tuple
    text: str


def kind_of(tensor: torch.Tensor) -> str | None:
    """ "NaN" or "infinity" if there is one in the tensor."""
    if not tensor.is_floating_point() or tensor.isfinite().all():
        return None
    return "NaN" if tensor.isnan().any() else "infinity"


def findings_of(chunks, probe, stats, failed: bool) -> list[Finding]:
    """Everything that is not finite on this rank. ``failed``: this rank is one whose check failed."""
    found = list(probe.findings) if probe else []
    found += [
        Finding((LOGITS, layer), f"the router's logits in decoder layer {layer} hold NaN or infinity")
        for layer in stats.layers_not_finite()
    ]
    for layer, label, weight, gradient in named_weights(chunks):
        if kind := kind_of(weight):
            found.append(Finding((WEIGHTS, layer), f"{label} holds {kind}"))
        if gradient is not None and (kind := kind_of(gradient)):
            # Backward runs from the last layer to the first; data-parallel sums spread it to ranks that did not fail.
            found.append(Finding((GRADIENTS, not failed, -layer), f"the gradient of {label} holds {kind}"))
    return found


def finding_of_norm(norm: float, chunks) -> Finding:
    """A gradient norm that is not finite although no check failed: sums over ranks overflowed."""
    largest, label = max(
        (gradient.abs().max().item(), label)
        for _, label, _, gradient in named_weights(chunks)
        if gradient is not None and gradient.numel()
    )
    text = f"the gradient norm is {norm}; the largest gradient, {largest:.3g}, is of {label}"
    return Finding((CHECK, -largest), text)


def first_of_all_ranks(findings: list[Finding]) -> tuple[str, str]:
    """The finding nearest to the origin over all ranks, with its rank, and its host. Every rank must call it."""
    rank = torch.distributed.get_rank()
    first = min(findings, default=None)
    ranks = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(ranks, first and (first.order, rank, first.text, os.uname().nodename))
    _, rank, text, host = min(entry for entry in ranks if entry)
    return f"rank {rank}: {text}", host


def labelled(model, name: str) -> tuple[int, str]:
    """(decoder layer, -1 before and a large number after the layers; what to call it) of a module or parameter name."""
    block, *parts = name.split(".")
    if block not in ("decoder", "mtp") or parts[:1] != ["layers"] or len(parts) < 2:
        return (-1 if block == "embedding" else 1 << 30), name or "the model"
    layer = getattr(model, block).layers[int(parts[1])].layer_number - 1
    what = ".".join(parts[2:]) or "the whole"
    if block == "mtp":
        layer, what = layer + model.config.num_layers, what.removeprefix("mtp_model_layer.")
        return layer, f"{what} in multi-token-prediction layer {layer}"
    return layer, f"{what} in decoder layer {layer}"


def named_weights(chunks):
    """(decoder layer, label, weight, its main_grad or None) of this rank's model chunks, experts piece by piece."""
    for model in map(unwrap_model, chunks):
        for name, parameter in model.named_parameters():
            layer, label = labelled(model, name)
            weight, gradient = parameter.detach(), getattr(parameter, "main_grad", None)
            owner, _, matrix = name.rpartition(".")
            experts = model.get_submodule(owner)
            if not hasattr(experts, "pieces"):
                yield layer, label, weight, gradient
                continue
            gradients = [None] * len(experts.pieces)
            if gradient is not None:
                gradients = [part for _, part in experts.by_piece(matrix, gradient)]
            for (piece, part), part_gradient in zip(experts.by_piece(matrix, weight), gradients, strict=True):
                yield layer, f"{matrix} of {piece} in decoder layer {layer}", part, part_gradient


class ModuleProbe:
    """While a step is repeated: the first module of this rank that gave what is not finite, or was given it."""

    def __init__(self, chunks):
        self.findings = []
        self._handles = []
        for model in map(unwrap_model, chunks):
            for name, module in model.named_modules():
                hook = self._hook(*labelled(model, name))
                self._handles.append(module.register_forward_hook(hook, with_kwargs=True))

    def remove(self) -> None:
        """Take the hooks out of the model."""
        for handle in self._handles:
            handle.remove()

    def _hook(self, layer, label):
        def look(module, args, kwargs, output):
            # A module's parts end before it does, so the first one found is the innermost.
            if self.findings or not (kind := _kind_in(output)):
                return
            if arrived := _kind_in((args, kwargs)):
                self.findings.append(Finding((ARRIVED, layer), f"{arrived} came into {label}"))
            else:
                experts = _experts(module, args, output)
                self.findings.append(Finding((MODULE, layer), f"{experts}{label} gave {kind} from finite input"))

        return look


def _kind_in(value) -> str | None:
    if isinstance(value, torch.Tensor):
        return kind_of(value)
    if isinstance(value, dict):
        value = value.values()
    elif not isinstance(value, (tuple, list)):
        return None
    return next(filter(None, map(_kind_in, value)), None)


def _experts(module, args, output) -> str:
    """ "expert 1, expert 3 of " for the experts' module: whose rows are not finite."""
    if not hasattr(module, "pieces"):
        return ""
    rows = args[1].tolist()[: len(module.pieces)]
    bad = [piece.expert for piece, y in zip(module.pieces, output[0].split(rows), strict=True) if kind_of(y)]
    return ", ".join(f"expert {expert}" for expert in bad) + " of "
