"""Where an HMoE model is a model that transformers has, it gives that model's logits."""

import pytest
import torch
from tiny_models import FP32_BOUND, tiny_model, token_ids
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from hmoe_megatron.hf.modeling_hmoe import HMoEForCausalLM

SHARED = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "intermediate_size": 24,
    "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0},
}
DENSE = {**SHARED, "expert_widths": [[], []], "num_experts_per_tok": None}
ATTENTION_KINDS = {
    "llama": (LlamaConfig, LlamaForCausalLM, {}),
    "qwen2, biases": (Qwen2Config, Qwen2ForCausalLM, {"attention_bias": True}),
    "qwen3, norms of heads": (Qwen3Config, Qwen3ForCausalLM, {"use_qk_norm": True}),
}


@torch.no_grad()
def assert_same_logits(ours, theirs):
    ids_BS = token_ids()
    expected = theirs.eval()(ids_BS).logits
    assert expected.std() > 0.1
    torch.testing.assert_close(ours(ids_BS).logits, expected, rtol=0, atol=FP32_BOUND)


@pytest.mark.parametrize("k", [1, 2, 4])
def test_equal_widths_with_top_k_are_mixtral(k):
    widths = [[24] * 4] * 2
    ours = tiny_model(**{**SHARED, "intermediate_size": None}, expert_widths=widths, num_experts_per_tok=k)
    state = ours.state_dict()
    for layer in range(2):
        mlp = f"model.layers.{layer}.mlp"
        experts = [
            {name: state.pop(f"{mlp}.experts.{e}.{name}_proj.weight") for name in ("gate", "up", "down")}
            for e in range(4)
        ]
        state[f"{mlp}.experts.gate_up_proj"] = torch.stack([torch.cat([e["gate"], e["up"]]) for e in experts])
        state[f"{mlp}.experts.down_proj"] = torch.stack([e["down"] for e in experts])
    theirs = MixtralForCausalLM(MixtralConfig(**SHARED, num_local_experts=4, num_experts_per_tok=k))
    theirs.load_state_dict(state)
    assert_same_logits(ours, theirs)


def test_vllm_is_told_that_it_cannot_run_unequal_experts():
    assert MixtralForCausalLM.is_backend_compatible() and not HMoEForCausalLM.is_backend_compatible()


@pytest.mark.parametrize("kind", ATTENTION_KINDS)
def test_dense_layers_are_llamas_and_qwens(kind):
    config_class, model_class, changes = ATTENTION_KINDS[kind]
    ours = tiny_model(**DENSE, **changes)
    theirs = model_class(config_class(**SHARED))
    theirs.load_state_dict(ours.state_dict())
    assert_same_logits(ours, theirs)
