"""Layer specs under both of Megatron's implementations, as far as that goes without CUDA."""

from functools import partial
from types import SimpleNamespace

import pytest
import torch
from megatron.core.models.gpt import gpt_layer_specs
from megatron.core.transformer.mlp import MLP

from hmoe_megatron.moe.layer import HMoELayer
from hmoe_megatron.moe.specs import hmoe_block_spec, with_hmoe_layer
from tests.distributed.ranks import run_ranks


def block(transformer_impl):
    """Names of what the specs of a dense layer and two MoE layers hold, for one pipeline rank."""
    from megatron.core import parallel_state
    from megatron.core.extensions.transformer_engine_spec_provider import TESpecProvider
    from megatron.core.transformer.transformer_config import TransformerConfig

    parallel_state.initialize_model_parallel()
    if transformer_impl == "transformer_engine":
        # Without Transformer Engine these two names are None; its classes themselves are stand-ins there.
        gpt_layer_specs.TESpecProvider, gpt_layer_specs.TENorm = TESpecProvider, type("TENorm", (), {})
    config = TransformerConfig(
        num_layers=3,
        hidden_size=8,
        num_attention_heads=2,
        num_moe_experts=4,
        moe_ffn_hidden_size=8,
        moe_layer_freq=[0, 1, 1],
        transformer_impl=transformer_impl,
        add_bias_linear=False,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        normalization="RMSNorm",
    )
    spec = hmoe_block_spec(None, SimpleNamespace(transformer=config))
    backend = TESpecProvider() if transformer_impl == "transformer_engine" else None
    layers = []
    for layer in spec.layer_specs:
        mlp, attention = layer.submodules.mlp, layer.submodules.self_attention.submodules
        layers.append(
            {
                "hmoe": isinstance(mlp, partial) and mlp.func is HMoELayer,
                "dense": isinstance(mlp, partial) and getattr(mlp.func, "__self__", None) is MLP,
                "layer": mlp.keywords.get("layer"),
                "te_attention": backend is not None and attention.linear_proj is backend.row_parallel_linear(),
                "te_shared_experts": backend is not None
                and "layer" in mlp.keywords
                and mlp.keywords["submodules"].shared_experts.keywords["submodules"].linear_fc2
                is backend.row_parallel_linear(),
            }
        )
    return layers, len({id(layer) for layer in spec.layer_specs}), spec.layer_norm.__name__


@pytest.mark.parametrize("transformer_impl", ["local", "transformer_engine"])
def test_only_the_moe_layers_mlp_is_ours(transformer_impl):
    ((layers, distinct, norm),) = run_ranks(1, block, transformer_impl)
    assert [layer["hmoe"] for layer in layers] == [False, True, True]
    assert [layer["dense"] for layer in layers] == [True, False, False]
    assert [layer["layer"] for layer in layers] == [None, 1, 2]
    assert distinct == 3, "layers must not share a spec object"
    te = transformer_impl == "transformer_engine"
    assert [layer["te_attention"] for layer in layers] == [te] * 3
    assert [layer["te_shared_experts"] for layer in layers] == [False, te, te]
    assert (norm == "TENorm") == te


def test_the_stock_spec_is_left_as_it_was():
    spec = gpt_layer_specs.get_gpt_layer_local_spec(num_experts=4, moe_grouped_gemm=False)
    before = spec.submodules.mlp
    ours = with_hmoe_layer(None, spec, 5)
    assert spec.submodules.mlp is before
    assert ours.submodules.mlp.keywords["layer"] == 5
    dense = gpt_layer_specs.get_gpt_layer_local_spec()
    assert with_hmoe_layer(None, dense, 5) is dense


def built_with_a_spec_without_experts():
    from tests.distributed.training_run import TINY, build

    try:
        build([*TINY, "--hmoe-widths", "16,32,48,64", "--spec", "tests.distributed.own_specs", "dense"])
    except ValueError as error:
        return str(error)


def test_a_spec_without_experts_is_refused_where_layers_have_some():
    assert run_ranks(1, built_with_a_spec_without_experts) == [
        "--spec has MoELayer in layers [], --moe-layer-freq in [0, 1]: change one of them"
    ]
