"""Weights that are no numbers: they are neither saved nor trained on."""

import torch
from megatron.core.utils import unwrap_model


def not_finite(models: list[torch.nn.Module]) -> list[str]:
    """Names of the parameters of this rank that hold a NaN or an infinity, experts by their logical number."""
    named = [(name, parameter) for model in unwrap_model(models) for name, parameter in _named(model)]
    if not named:
        return []
    finite = torch.stack([parameter.detach().isfinite().all() for _, parameter in named]).tolist()
    return [name for (name, _), is_finite in zip(named, finite, strict=True) if not is_finite]


def _named(model):
    """(name with global layer, logical expert and width range, parameter) of every parameter."""
    layers = {id(parameter): (layer, name) for layer in getattr(getattr(model, "decoder", None), "layers", ())
              for name, parameter in layer.named_parameters()}
    pieces = {id(parameter): (piece, name) for piece in model.modules() if hasattr(piece, "linear_fc1_weight")
              for name, parameter in piece.named_parameters()}
    for name, parameter in model.named_parameters():
        if id(parameter) in layers:
            layer, name = layers[id(parameter)]
            if id(parameter) in pieces:
                piece, matrix = pieces[id(parameter)]
                name = f"expert {piece.expert} [{piece.lo}:{piece.hi}) {matrix}"
            name = f"layer {layer.layer_number - 1} {name}"
        yield name, parameter
