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
    return block


def _layers_of_stage(config, num_layers: int, vp_stage) -> list[int]:
    if config.pipeline_model_parallel_layout is not None:
        return config.pipeline_model_parallel_layout.get_layer_id_list(layer_type=LayerType.decoder, vp_stage=vp_stage)
    first = get_transformer_layer_offset(config, vp_stage=vp_stage)
    return list(range(first, first + num_layers))


def with_hmoe_layer(layout, spec, layer: int):
    """The transformer layer's spec with its MoELayer replaced; a dense layer's spec as it is.

    Copies what it changes: Megatron hands out one spec object for all layers.
    """
    mlp = spec.submodules.mlp
    if not (isinstance(mlp, partial) and mlp.func is MoELayer):
        return spec
    spec = copy.copy(spec)
    spec.submodules = copy.copy(spec.submodules)
    spec.submodules.mlp = hmoe_layer(layout, mlp.keywords["submodules"].shared_experts, layer)
    return spec
