"""Layer specs: Megatron's decoder block, or that of --spec, with HMoELayer in place of MoELayer, one spec a layer."""

import copy
import importlib
import inspect
from functools import partial

from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.transformer.enums import LayerType
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import _get_block_submodules
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

from hmoe_megatron.moe.layer import hmoe_layer


def spec_of_user(words: list[str] | None):
    """What --spec MODULE NAME names, None without it. Raises ValueError where there is no such thing."""
    if words is None:
        return None
    try:
        module, name = words
        return getattr(importlib.import_module(module), name)
    except (ValueError, ImportError, AttributeError) as error:
        raise ValueError(f"--spec {' '.join(words)}: {error}: give a module and the name of a spec in it") from None


def hmoe_block_spec(layout, model_config, vp_stage=None, *, given=None):
    """Spec of this pipeline stage's decoder block (``GPTModelConfig.transformer_layer_spec``, with ``layout`` bound).

    Attention, norms, dense and shared MLPs stay as Megatron's local or Transformer Engine spec has them, or ``given``,
    that of --spec: of a block or of a layer, or what Megatron calls for one.
    """
    config = model_config.transformer
    if given is None:
        block = get_gpt_decoder_block_spec(
            config,
            use_transformer_engine=config.transformer_impl == "transformer_engine",
            normalization=config.normalization,
            qk_l2_norm=config.qk_l2_norm,
            vp_stage=vp_stage,
        )
    else:
        block = _given_block(given, model_config, vp_stage)
    layers = _layers_of_stage(config, len(block.layer_specs), vp_stage)
    if given is not None:
        experts = [layer for layer, spec in zip(layers, block.layer_specs, strict=True) if _is_moe(spec)]
        if experts != (wanted := [layer for layer in layers if layer in layout.widths]):
            raise ValueError(
                f"--spec has MoELayer in layers {experts}, --moe-layer-freq in {wanted}: change one of them"
            )
    block.layer_specs = [
        with_hmoe_layer(layout, spec, layer) for spec, layer in zip(block.layer_specs, layers, strict=True)
    ]
    block.of_prediction_layer = lambda spec, place: with_hmoe_layer(layout, spec, config.num_layers + place)
    return block


def prediction_layers_with_experts(mtp_block, decoder_block):
    """Megatron's spec of the multi-token-prediction layers, or None, with HMoELayer where the model of `decoder_block`
    is ours; their numbers go on from the decoder layers'."""
    if mtp_block is None or not hasattr(decoder_block, "of_prediction_layer"):
        return mtp_block
    mtp_block.layer_specs = [
        _with_submodule(
            spec, "mtp_model_layer", decoder_block.of_prediction_layer(spec.submodules.mtp_model_layer, place)
        )
        for place, spec in enumerate(mtp_block.layer_specs)
    ]
    return mtp_block


def _given_block(given, model_config, vp_stage):
    if callable(given) and not isinstance(given, ModuleSpec):
        of_stage = {"vp_stage": vp_stage} if "vp_stage" in inspect.signature(given).parameters else {}
        given = given(model_config, **of_stage)
    return copy.copy(_get_block_submodules(model_config.transformer, given, vp_stage))


def _is_moe(spec) -> bool:
    mlp = spec.submodules.mlp
    return isinstance(mlp, partial) and mlp.func is MoELayer


def _layers_of_stage(config, num_layers: int, vp_stage) -> list[int]:
    if config.pipeline_model_parallel_layout is not None:
        return config.pipeline_model_parallel_layout.get_layer_id_list(layer_type=LayerType.decoder, vp_stage=vp_stage)
    first = get_transformer_layer_offset(config, vp_stage=vp_stage)
    return list(range(first, first + num_layers))


def with_hmoe_layer(layout, spec, layer: int):
    """The transformer layer's spec with its MoELayer replaced; a dense layer's spec as it is."""
    if not _is_moe(spec):
        return spec
    shared_experts = spec.submodules.mlp.keywords["submodules"].shared_experts
    return _with_submodule(spec, "mlp", hmoe_layer(layout, shared_experts, layer))


def _with_submodule(spec, name: str, submodule):
    """A copy of the spec with another submodule of that name: Megatron hands out one spec object for all layers."""
    spec = copy.copy(spec)
    spec.submodules = copy.copy(spec.submodules)
    setattr(spec.submodules, name, submodule)
    return spec
