"""Which tensor of Megatron's holds which of Hugging Face's, both ways: the one table of every conversion.

Legend: H hidden size, F width of an expert, E experts, D head size, G query groups, V vocabulary.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch

from hmoe_megatron.hf.model_settings import ModelSettings

Tensors = Sequence[torch.Tensor]


class Part(NamedTuple):
    """One Megatron tensor. keys: what a checkpoint may call it, the first where this project writes it; shape: there;
    names: Hugging Face's, in the order that `split` gives and `join`, its inverse, takes. Both only move values. dtype:
    None is the model's. copies: further names of the first tensor, which a directory may lack."""

    keys: tuple[str, ...]
    shape: tuple[int, ...]
    names: tuple[str, ...]
    split: Callable[[torch.Tensor], Tensors] = lambda tensor: [tensor]
    join: Callable[[Tensors], torch.Tensor] = lambda tensors: tensors[0]
    dtype: torch.dtype | None = None
    copies: tuple[str, ...] = ()

    def hf_shapes(self) -> list[tuple[int, ...]]:
        return [tuple(tensor.shape) for tensor in self.split(torch.empty(self.shape, device="meta"))]


def blocks(model: ModelSettings) -> Iterator[tuple[str, list[Part]]]:
    """(name, its parts): the embedding, each layer, what comes after them. All tensors of the model, each once."""
    rows = (model.vocabulary_rows, model.hidden)
    predicting = [f"model.layers.{layer}" for layer in range(model.layers, len(model.widths))]
    copies = tuple(f"{theirs}.embed_tokens.weight" for theirs in predicting)
    embedding = Part(("embedding.word_embeddings.weight",), rows, ("model.embed_tokens.weight",), copies=copies)
    yield "embedding", [embedding]
    attention = _latent_attention if model.deepseek else _attention
    for layer, widths_E in enumerate(model.widths):
        ours, theirs, parts = f"decoder.layers.{layer}", f"model.layers.{layer}", []
        if layer >= model.layers:
            predicts = f"mtp.layers.{layer - model.layers}"
            ours, parts = f"{predicts}.transformer_layer", list(_prediction(model, predicts, theirs))
        yield f"layer {layer}", [*parts, *attention(model, ours, theirs), *_mlp(model, ours, theirs, widths_E)]
    last = [Part(("decoder.final_layernorm.weight",), (model.hidden,), ("model.norm.weight",))]
    if not model.tied:
        copies = tuple(f"{theirs}.shared_head.head.weight" for theirs in predicting)
        last.append(Part(("output_layer.weight",), rows, ("lm_head.weight",), copies=copies))
    yield "head", last


def _attention(model: ModelSettings, ours: str, theirs: str) -> Iterator[Part]:
    sizes = (model.groups, model.heads // model.groups, model.head_dim)
    rows = (model.heads + 2 * model.groups) * model.head_dim
    attention, qkv = f"{ours}.self_attention", ("q_proj", "k_proj", "v_proj")
    # Megatron names a layer's first norm as if it were fused into the matrix after it, as Transformer Engine has it.
    yield Part(
        (f"{attention}.linear_qkv.layer_norm_weight", f"{ours}.input_layernorm.weight"),
        (model.hidden,),
        (f"{theirs}.input_layernorm.weight",),
    )
    for kind, shape in (("weight", (rows, model.hidden)), ("bias", (rows,))):
        if kind == "weight" or model.qkv_bias:
            yield Part(
                (f"{attention}.linear_qkv.{kind}",),
                shape,
                tuple(f"{theirs}.self_attn.{name}.{kind}" for name in qkv),
                lambda tensor: split_qkv(tensor, *sizes),
                lambda tensors: join_qkv(tensors, *sizes),
            )
    yield Part(
        (f"{attention}.linear_proj.weight",),
        (model.hidden, model.heads * model.head_dim),
        (f"{theirs}.self_attn.o_proj.weight",),
    )
    if model.qk_norm:
        for name in ("q", "k"):
            yield Part(
                (f"{attention}.{name}_layernorm.weight",),
                (model.head_dim,),
                (f"{theirs}.self_attn.{name}_norm.weight",),
            )


def _mlp(model: ModelSettings, ours: str, theirs: str, widths_E: Sequence[int]) -> Iterator[Part]:
    yield Part(
        (f"{ours}.mlp.linear_fc1.layer_norm_weight", f"{ours}.pre_mlp_layernorm.weight"),
        (model.hidden,),
        (f"{theirs}.post_attention_layernorm.weight",),
    )
    if not widths_E:
        yield from _dense(model.hidden, model.dense_width, f"{ours}.mlp", f"{theirs}.mlp")
        return
    yield Part((f"{ours}.mlp.router.weight",), (len(widths_E), model.hidden), (f"{theirs}.mlp.gate.weight",))
    if model.deepseek:
        bias = (f"{theirs}.mlp.gate.e_score_correction_bias",)
        yield Part((f"{ours}.mlp.router.expert_bias",), (len(widths_E),), bias, dtype=torch.float32)
        shared = model.deepseek.moe_shared_expert_intermediate_size
        yield from _dense(model.hidden, shared, f"{ours}.mlp.shared_experts", f"{theirs}.mlp.shared_experts")
    for expert, width in enumerate(widths_E):
        key, name = f"{ours}.mlp.experts.{expert}", f"{theirs}.mlp.experts.{expert}"
        yield Part(
            (f"{key}.linear_fc1.weight",),
            (2, width, model.hidden),
            (f"{name}.gate_proj.weight", f"{name}.up_proj.weight"),
            torch.unbind,
            torch.stack,
        )
        yield Part((f"{key}.linear_fc2.weight",), (model.hidden, width), (f"{name}.down_proj.weight",))


def _dense(hidden: int, width: int, ours: str, theirs: str) -> Iterator[Part]:
    yield Part(
        (f"{ours}.linear_fc1.weight",),
        (2 * width, hidden),
        tuple(f"{theirs}.{name}_proj.weight" for name in ("gate", "up")),
        lambda tensor: tensor.chunk(2),
        torch.cat,
    )
    yield Part((f"{ours}.linear_fc2.weight",), (hidden, width), (f"{theirs}.down_proj.weight",))


def _latent_attention(model: ModelSettings, ours: str, theirs: str) -> Iterator[Part]:
    """Rows of both are in the same order: a head's without and with position, of pairs; a head's key and value."""
    deepseek, attention, their_attention = model.deepseek, f"{ours}.self_attention", f"{theirs}.self_attn"
    query = model.heads * (deepseek.qk_head_dim + deepseek.qk_pos_emb_head_dim)
    key_value = model.heads * (deepseek.qk_head_dim + deepseek.v_head_dim)
    down = deepseek.kv_lora_rank + deepseek.qk_pos_emb_head_dim
    yield Part((f"{ours}.input_layernorm.weight",), (model.hidden,), (f"{theirs}.input_layernorm.weight",))
    matrices = {
        "linear_q_down_proj": ("q_a_proj", (deepseek.q_lora_rank, model.hidden)),
        "linear_q_up_proj": ("q_b_proj", (query, deepseek.q_lora_rank)),
        "linear_kv_down_proj": ("kv_a_proj_with_mqa", (down, model.hidden)),
        "linear_kv_up_proj": ("kv_b_proj", (key_value, deepseek.kv_lora_rank)),
        "linear_proj": ("o_proj", (model.hidden, model.heads * deepseek.v_head_dim)),
    }
    for name, (their_name, shape) in matrices.items():
        yield Part((f"{attention}.{name}.weight",), shape, (f"{their_attention}.{their_name}.weight",))
    for name, rank in (("q", deepseek.q_lora_rank), ("kv", deepseek.kv_lora_rank)):
        # Transformer Engine has the norm in the matrix after it.
        keys = (f"{attention}.{name}_layernorm.weight", f"{attention}.linear_{name}_up_proj.layer_norm_weight")
        yield Part(keys, (rank,), (f"{their_attention}.{name}_a_layernorm.weight",))


def _prediction(model: ModelSettings, ours: str, theirs: str) -> Iterator[Part]:
    """Around the layer that predicts one more token; both join the embedding and the hidden state in this order."""
    yield Part((f"{ours}.eh_proj.weight",), (model.hidden, 2 * model.hidden), (f"{theirs}.eh_proj.weight",))
    for name, their_name in (("enorm", "enorm"), ("hnorm", "hnorm"), ("final_layernorm", "shared_head.norm")):
        yield Part((f"{ours}.{name}.weight",), (model.hidden,), (f"{theirs}.{their_name}.weight",))


def split_qkv(tensor: torch.Tensor, groups: int, heads_per_group: int, head_dim: int) -> list[torch.Tensor]:
    """Megatron's rows, a group's queries, key and value in turn, as [G (h D), ...], [G D, ...], [G D, ...]."""
    by_group = tensor.view(groups, heads_per_group + 2, head_dim, *tensor.shape[1:])
    parts = by_group.split((heads_per_group, 1, 1), dim=1)
    return [part.reshape(-1, *tensor.shape[1:]) for part in parts]


def join_qkv(tensors: Tensors, groups: int, heads_per_group: int, head_dim: int) -> torch.Tensor:
    """The inverse of `split_qkv`."""
    parts = [tensor.view(groups, -1, head_dim, *tensor.shape[1:]) for tensor in tensors]
    return torch.cat(parts, dim=1).reshape(-1, *tensors[0].shape[1:])


def stored_parts(model: ModelSettings, stored: Sequence[str]) -> dict[str, list[tuple[str, Part]]]:
    """{block: [(its key in this checkpoint, part)]}. stored: the keys of all model tensors that a checkpoint holds.

    Raises ValueError that lists every tensor that is missing and every one that nothing would take.
    """
    left, missing, found = set(stored), [], {}
    for name, parts in blocks(model):
        found[name] = []
        for part in parts:
            key = next((key for key in part.keys if key in left), None)
            if key is None:
                missing.append(part.keys[0])
            else:
                left.discard(key)
                found[name].append((key, part))
    check_complete(missing, sorted(left), "the checkpoint")
    return found


def check_complete(missing: Sequence[str], unused: Sequence[str], where: str) -> None:
    """Raises ValueError that lists what is missing and what is unused; nothing is lost in silence."""
    if missing or unused:
        sentences = [
            f"{len(names)} {what}: {listed(names, ', ')}"
            for what, names in (("missing", missing), ("that the model has no place for", unused))
            if names
        ]
        raise ValueError(f"{where}: tensors {'; '.join(sentences)}; nothing was written")


def listed(sentences: Sequence[str], between: str) -> str:
    """The first of them, for an error."""
    return between.join(sentences[:20]) + (" ..." if len(sentences) > 20 else "")
