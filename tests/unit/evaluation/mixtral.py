"""The tiny checkpoint's weights, which are those of a Mixtral, as a Hugging Face directory."""

import torch

from hmoe_megatron.evaluation.inputs import Source
from hmoe_megatron.evaluation.models import open_model
from tests.distributed.training_run import EXPERTS, HIDDEN, LAYERS
from tests.unit.evaluation.tiny import CONTEXT, SENTENCES

HEADS, WIDTH = 4, 24


def save(run, tokenizer, output):
    """From the last checkpoint of `run`, without the rows that pad its vocabulary. In a process of its own: Megatron's
    state is global. Returns (tokens, tokens, logits, logits) of both for every one of SENTENCES."""
    from transformers import AutoTokenizer, MixtralConfig, MixtralForCausalLM

    live = open_model(Source("load", str(run)))
    ours = dict(live.module.named_parameters())
    config = MixtralConfig(
        vocab_size=live.vocabulary, hidden_size=HIDDEN, intermediate_size=WIDTH,
        num_hidden_layers=LAYERS, num_attention_heads=HEADS, num_key_value_heads=HEADS, num_local_experts=EXPERTS,
        num_experts_per_tok=2, max_position_embeddings=CONTEXT, rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )  # fmt: skip
    weights = {
        "model.embed_tokens.weight": ours["embedding.word_embeddings.weight"][: live.vocabulary],
        "model.norm.weight": ours["decoder.final_layernorm.weight"],
        "lm_head.weight": ours["output_layer.weight"][: live.vocabulary],
    }
    for layer in range(LAYERS):
        layer_weights = _layer(ours, f"decoder.layers.{layer}.")
        weights |= {f"model.layers.{layer}.{name}": weight for name, weight in layer_weights.items()}
    model = MixtralForCausalLM(config)
    model.load_state_dict(weights)
    model.save_pretrained(output)
    AutoTokenizer.from_pretrained(tokenizer).save_pretrained(output)
    theirs = open_model(Source("hf", str(output)))
    return [(live.encode(text), theirs.encode(text), *(_logits(each, live.encode(text)) for each in (live, theirs)))
            for text in SENTENCES]  # fmt: skip


@torch.inference_mode()
def _logits(model, tokens):
    return model.logits(torch.tensor([tokens])).cpu()


def _layer(weights, prefix):
    experts = [f"{prefix}mlp.experts.pieces.{expert}." for expert in range(EXPERTS)]
    qkv = weights[f"{prefix}self_attention.linear_qkv.weight"].view(HEADS, 3, HIDDEN // HEADS, HIDDEN)
    projections = {f"self_attn.{name}_proj.weight": qkv[:, i].reshape(HIDDEN, HIDDEN) for i, name in enumerate("qkv")}
    return projections | {
        "self_attn.o_proj.weight": weights[f"{prefix}self_attention.linear_proj.weight"],
        "input_layernorm.weight": weights[f"{prefix}input_layernorm.weight"],
        "post_attention_layernorm.weight": weights[f"{prefix}pre_mlp_layernorm.weight"],
        "mlp.gate.weight": weights[f"{prefix}mlp.router.weight"],
        "mlp.experts.gate_up_proj": torch.stack([weights[f"{name}linear_fc1_weight"] for name in experts]),
        "mlp.experts.down_proj": torch.stack([weights[f"{name}linear_fc2_weight"] for name in experts]),
    }
