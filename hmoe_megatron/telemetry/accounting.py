"""Parameters, FLOPs and memory by the real widths.

Megatron's own reports multiply one width by the number of experts. Here they are handed the widths that the layers
really have and the width that tokens really activate.
"""

import argparse
import copy
import dataclasses

from hmoe_megatron.config import HMoEConfig, expert_hidden_size, mtp_layers
from hmoe_megatron.patches import hooks


@dataclasses.dataclass(frozen=True)
class ParameterCounts:
    """Parameters of a model: those every token uses, and those of the routed experts."""

    always_active: int
    experts: int

    @property
    def total(self) -> int:
        """All parameters."""
        return self.always_active + self.experts


def expert_parameters(hidden_size: int, width: float) -> float:
    """Parameters of SwiGLU experts of a summed width: gate, up and down projections."""
    return 3 * hidden_size * width


def parameter_counts(args: argparse.Namespace, widths: dict[int, tuple[int, ...]]) -> ParameterCounts:
    """Count the model that ``args`` (Megatron's, validated) and ``widths`` (decoder layer -> widths) describe."""
    layers = range(args.num_layers + len(mtp_layers(args)))
    always = dense_parameters(args, widths, layers, is_first=True, is_last=True)
    return ParameterCounts(always, int(expert_parameters(expert_hidden_size(args), sum(map(sum, widths.values())))))


def dense_parameters(
    args: argparse.Namespace,
    widths: dict[int, tuple[int, ...]],
    layers: range,
    is_first: bool,
    is_last: bool,
    tensor_parallel: int = 1,
) -> int:
    """All but the routed experts of these layers, decoder and multi-token prediction, on one of ``tensor_parallel``
    ranks; is_first, is_last: of the pipeline's stages, which have the embedding and the output layer."""
    hidden, norm = args.hidden_size, args.hidden_size * _norm_numbers(args)
    divided, whole = _latent_attention(args) if args.multi_latent_attention else _attention(args)
    divided, whole = len(layers) * divided, len(layers) * (whole + 2 * norm)  # whole: what every rank holds
    shared_width = args.moe_shared_expert_intermediate_size or 0
    for layer in layers:
        if layer in widths:
            divided += expert_parameters(hidden, shared_width)
            whole += 2 * hidden * (args.moe_latent_size or 0)  # to the experts' size and back
            whole += hidden * (len(widths[layer]) + bool(args.moe_shared_expert_gate and shared_width))
        else:
            divided += expert_parameters(hidden, args.ffn_hidden_size)
    predicting = len(set(layers) & set(mtp_layers(args)))
    divided += predicting * 2 * hidden * hidden  # the last state and the next token's embedding to one state
    whole += predicting * 3 * norm
    vocabulary = args.padded_vocab_size * hidden
    if is_first or predicting:
        divided += vocabulary
        whole += args.max_position_embeddings * hidden if args.position_embedding_type == "learned_absolute" else 0
    if is_last:
        divided += vocabulary if args.untie_embeddings_and_output_weights or not is_first else 0
        whole += norm
    return int(divided // tensor_parallel + whole)


def _norm_numbers(args) -> int:
    return 1 if args.normalization == "RMSNorm" else 2


def query_groups(args: argparse.Namespace) -> int:
    """Heads of keys, and of values."""
    return args.num_query_groups if args.group_query_attention else args.num_attention_heads


def _attention(args) -> tuple[int, int]:
    """(divided by tensor parallelism, on every rank) of a layer's attention."""
    heads_width = args.num_attention_heads * args.kv_channels
    qkv_width = (1 + args.attention_output_gate) * heads_width + 2 * query_groups(args) * args.kv_channels
    divided = args.hidden_size * (qkv_width + heads_width) + (qkv_width if args.add_qkv_bias else 0)
    return divided, 2 * args.kv_channels * _norm_numbers(args) if args.qk_layernorm else 0


def _latent_attention(args) -> tuple[int, int]:
    """The same of multi-latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1): keys and values, and with
    --q-lora-rank queries, come from short vectors. Transformer Engine has the way down to these on every rank."""
    hidden, heads, of_q = args.hidden_size, args.num_attention_heads, args.qk_head_dim + args.qk_pos_emb_head_dim
    down = hidden * (args.kv_lora_rank + args.qk_pos_emb_head_dim + (args.q_lora_rank or 0))
    up = heads * args.kv_lora_rank * (args.qk_head_dim + args.v_head_dim)
    up += heads * of_q * (args.q_lora_rank or hidden)
    norms = (args.kv_lora_rank + (args.q_lora_rank or 0)) * _norm_numbers(args) if args.qk_layernorm else 0
    rest = up + heads * args.v_head_dim * hidden
    return (down + rest, norms) if args.transformer_impl == "local" else (rest, down + norms)


def expected_active_width(settings: HMoEConfig, topk: int, widths: tuple[int, ...]) -> float:
    """Width a token activates in a layer if routing were uniform: what reports use until it has been measured."""
    mean = sum(widths) / len(widths)
    if settings.router == "topk":
        return topk * mean
    uniform = -(-settings.top_p * len(widths) // 1)  # the fewest of equal probabilities that reach top_p
    return min(uniform, settings.max_experts_per_token or len(widths)) * mean


def report_real_widths(widths: dict[int, tuple[int, ...]], active_width) -> None:
    """Make Megatron's FLOPs and memory reports use the real widths.

    active_width: function without arguments, the width a token activates in a MoE layer, mean over MoE layers, latest
    measurement.
    """
    mean_width = sum(map(sum, widths.values())) / sum(map(len, widths.values()))

    def seen(args, width, topk):
        seen = copy.copy(args)
        seen.moe_ffn_hidden_size, seen.moe_router_topk = width, topk
        return seen

    hooks.reports_of_flops_and_memory(
        lambda args: seen(args, active_width(), 1), lambda args: seen(args, mean_width, active_width() / mean_width)
    )
