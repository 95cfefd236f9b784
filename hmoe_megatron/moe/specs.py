"""Layer specs: Megatron's decoder block with HMoELayer in place of MoELayer, one spec a layer."""

import copy
from functools import partial

from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.transformer.enums import LayerType
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

from hmoe_megatron.moe.layer import hmoe_layer


def hmoe_block_spec(layout, model_config, vp_stage=None):
    """Spec of this pipeline stage's decoder block (``GPTModelConfig.transformer_layer_spec``, with ``layout`` bound).

    Attention, norms, dense and shared MLPs stay as Megatron's local or Transformer Engine spec has them.
    """
    config = model_config.transformer
    block = get_gpt_decoder_block_spec(
        config,
        use_transformer_engine=config.transformer_impl == "transformer_engine",
        normalization=config.normalization,
        qk_l2_norm=config.qk_l2_norm,
        vp_stage=vp_stage,
    )
    layers = _layers_of_stage(config, len(block.layer_specs), vp_stage)
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


def _layers_of_stage(config, num_layers: int, vp_stage) -> list[int]:
    if config.pipeline_model_parallel_layout is not None:
        return config.pipeline_model_parallel_layout.get_layer_id_list(layer_type=LayerType.decoder, vp_stage=vp_stage)
    first = get_transformer_layer_offset(config, vp_stage=vp_stage)
    return list(range(first, first + num_layers))


def with_hmoe_layer(layout, spec, layer: int):
    """The transformer layer's spec with its MoELayer replaced; a dense layer's spec as it is."""
    mlp = spec.submodules.mlp
    if not (isinstance(mlp, partial) and mlp.func is MoELayer):
        return spec
    return _with_submodule(spec, "mlp", hmoe_layer(layout, mlp.keywords["submodules"].shared_experts, layer))


def _with_submodule(spec, name: str, submodule):
    """A copy of the spec with another submodule of that name: Megatron hands out one spec object for all layers."""
    spec = copy.copy(spec)
    spec.submodules = copy.copy(spec.submodules)
    setattr(spec.submodules, name, submodule)
    return spec
