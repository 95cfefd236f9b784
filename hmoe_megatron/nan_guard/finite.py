"""Weights that are no numbers: they are neither saved nor trained on."""

import torch
from megatron.core.utils import unwrap_model


def not_finite(models: list[torch.nn.Module]) -> list[str]:
    """Names of the parameters of this rank that hold a NaN or an infinity, experts by their logical number."""
    named = [entry for model in unwrap_model(models) for entry in _named(model)]
    if not named:
        return []
    finite = torch.stack([parameter.detach().isfinite().all() for _, parameter in named]).tolist()
    return [name for (name, _), is_finite in zip(named, finite, strict=True) if not is_finite]


def _named(model):
    """(name with global layer, logical expert and width range, weight) of every parameter, experts piece by piece."""
    layers = {
        id(parameter): (layer, name)
        for layer in getattr(getattr(model, "decoder", None), "layers", ())
        for name, parameter in layer.named_parameters()
    }
    experts = {
        id(parameter): (module, matrix)
        for module in model.modules()
        if hasattr(module, "pieces")
        for matrix, parameter in module.named_parameters()
    }
    for name, parameter in model.named_parameters():
        layer, name = layers.get(id(parameter), (None, name))
        prefix = "" if layer is None else f"layer {layer.layer_number - 1} "
        if id(parameter) in experts:
            module, matrix = experts[id(parameter)]
            yield from ((f"{prefix}{piece} {matrix}", part) for piece, part in module.by_piece(matrix))
        else:
            yield prefix + name, parameter
