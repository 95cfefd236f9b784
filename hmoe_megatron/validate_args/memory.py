"""Bytes that a rank will hold: weights, gradients and optimizer state exactly, activations about.

Legend: h hidden size, e bytes of an element, V rows of the vocabulary. Attention is taken to keep its scores where
Megatron computes it itself (`--transformer-impl local`), and not where Transformer Engine does.
"""

import argparse
from typing import NamedTuple

from hmoe_megatron.moe.layout import ExpertLayout
from hmoe_megatron.telemetry.accounting import dense_parameters, expected_active_width, expert_parameters
from hmoe_megatron.validate_args.sizes import expert_tensor_parallel_size


class RankMemory(NamedTuple):
    """Bytes of one rank. stage, rank: of the pipeline and of the expert-parallel group. attention, experts, logits: of
    activations, with what stands beside the first two in a layer."""

    stage: int
    rank: int
    weights: int
    gradients: int
    optimizer: int
    attention: float
    experts: float
    logits: float

    @property
    def total(self) -> float:
        return sum(self[2:])


class _Copies(NamedTuple):
    """Bytes that a parameter takes: its weight, its gradient, its optimizer state."""

    weight: float
    gradient: float
    optimizer: float


def fullest_rank(args: argparse.Namespace, layout: ExpertLayout) -> RankMemory:
    """args: Megatron's, validated. Even routing is assumed."""
    stages, ranks = args.pipeline_model_parallel_size, layout.plan.ranks
    found = [of_rank(args, layout, stage, rank) for stage in range(stages) for rank in range(ranks)]
    return max(found, key=lambda memory: memory.total)


def of_rank(args: argparse.Namespace, layout: ExpertLayout, stage: int, rank: int) -> RankMemory:
    """Of one pipeline stage and expert-parallel rank."""
    layers = layers_of(args, stage)
    is_last, tensor = stage == args.pipeline_model_parallel_size - 1, args.tensor_model_parallel_size
    dense = dense_parameters(args, layout.widths, layers, stage == 0, is_last, tensor)
    held = _expert_width(layout, layers, rank)
    experts = expert_parameters(args.hidden_size, held) // expert_tensor_parallel_size(args)
    replicas = args.data_parallel_size * args.context_parallel_size
    expert_replicas = args.world_size // (
        args.pipeline_model_parallel_size * layout.plan.ranks * expert_tensor_parallel_size(args)
    )
    of_dense, of_experts = _copies(args, replicas), _copies(args, expert_replicas)
    live = _live_micro_batches(args, stage)
    attention, routed = _activations(args, layout, layers, rank)
    return RankMemory(
        stage,
        rank,
        *(round(dense * one + experts * other) for one, other in zip(of_dense, of_experts, strict=True)),
        live * attention,
        live * routed,
        _logits(args) if is_last else 0.0,
    )


def layers_of(args: argparse.Namespace, stage: int) -> range:
    """Decoder layers of a pipeline stage. With virtual stages their numbers are others, their count is this."""
    stages, first, last = (
        args.pipeline_model_parallel_size,
        args.decoder_first_pipeline_num_layers,
        args.decoder_last_pipeline_num_layers,
    )
    counts = [None] * stages
    if first is not None:
        counts[0] = first
    if last is not None:
        counts[-1] = last
    rest = counts.count(None)
    share = (args.num_layers - sum(filter(None, counts))) // rest if rest else 0
    counts = [share if count is None else count for count in counts]
    return range(sum(counts[:stage]), sum(counts[: stage + 1]))


def _expert_width(layout: ExpertLayout, layers: range, rank: int) -> int:
    return sum(piece.width for layer in layers if layer in layout.widths for piece in layout.pieces(layer)[rank])


def _copies(args, replicas: int) -> _Copies:
    """Adam's; of fewer moments with other optimizers."""
    is_half = args.bf16 or args.fp16
    weight = 2 if is_half else 4
    gradient = 4 if args.accumulate_allreduce_grads_in_fp32 or not is_half else 2
    moments = {"adam": 8, "lion": 4, "sgd": 4 if args.sgd_momentum else 0}[args.optimizer]
    state = moments + (4 if is_half else 0)  # and the fp32 weight
    return _Copies(weight, gradient, state / (replicas if args.use_distributed_optimizer else 1))


def _live_micro_batches(args, stage: int) -> float:
    """Whose activations a stage holds at once: 1F1B, or interleaved over virtual stages."""
    stages, chunks = args.pipeline_model_parallel_size, args.virtual_pipeline_model_parallel_size or 1
    count = args.global_batch_size // (args.micro_batch_size * args.data_parallel_size)
    if chunks == 1:
        return min(count, stages - stage)
    return min(count * chunks, 2 * (stages - stage - 1) + (chunks - 1) * stages + 1) / chunks


def _activations(args, layout, layers: range, rank: int) -> tuple[float, float]:
    """(attention and norms, experts and what leads to them) of one micro-batch through the layers, in bytes."""
    e = 2 if args.bf16 or args.fp16 else 4
    h, tensor = args.hidden_size, args.tensor_model_parallel_size
    sequence = args.seq_length // args.context_parallel_size
    tokens = sequence * args.micro_batch_size
    here = tokens / tensor  # with sequence parallelism
    if args.recompute_granularity == "full":
        return len(layers) * here * h * e, 0.0
    heads = args.num_attention_heads / tensor
    groups = (args.num_query_groups if args.group_query_attention else args.num_attention_heads) / tensor
    selected = set(args.recompute_modules or ()) if args.recompute_granularity == "selective" else set()
    attention = here * h * 2 * e + tokens * args.kv_channels * (2 * heads + 2 * groups) * e
    if args.transformer_impl == "local" and "core_attn" not in selected:
        attention += 2 * heads * sequence * tokens * e  # scores and their softmax
    routed = 0.0
    for layer in layers:
        routed += here * h * 2 * e
        if layer not in layout.widths:
            routed += 3 * tokens * args.ffn_hidden_size / tensor * e
            continue
        if "moe" in selected:
            continue
        widths = layout.widths[layer]
        routed += here * len(widths) * 3 * 4 + 3 * tokens * (args.moe_shared_expert_intermediate_size or 0) / tensor * e
        chosen = expected_active_width(layout.settings, args.moe_router_topk, widths) * len(widths) / sum(widths)
        rows = here * chosen / len(widths) * layout.plan.ranks  # of one expert, from all ranks
        pieces, share = layout.pieces(layer)[rank], expert_tensor_parallel_size(args)
        kept = 3 if layout.settings.keep_hidden else 2
        routed += sum(rows * share * (2 * h + kept * piece.width / share) * e for piece in pieces)
    return len(layers) * attention, routed


def _logits(args) -> float:
    """In the model's type, their softmax and its gradient in fp32; the last micro-batch of the last stage."""
    e = 2 if args.bf16 or args.fp16 else 4
    tokens = args.seq_length // args.context_parallel_size * args.micro_batch_size
    return tokens * args.padded_vocab_size / args.tensor_model_parallel_size * (e + 8)


def memory_lines(memory: RankMemory) -> list[str]:
    """For people, at most 100 columns."""
    gib = {name: value / 2**30 for name, value in zip(memory._fields[2:], memory[2:], strict=True)}
    return [
        f" memory of the fullest rank, {memory.total / 2**30:.2f} GiB with even routing (pipeline stage "
        f"{memory.stage}, expert-parallel rank {memory.rank}):",
        f"   weights {gib['weights']:.2f}, gradients {gib['gradients']:.2f}, optimizer {gib['optimizer']:.2f}; "
        f"activations about {gib['attention'] + gib['experts'] + gib['logits']:.2f} "
        f"(attention {gib['attention']:.2f}, experts {gib['experts']:.2f}, logits {gib['logits']:.2f})",
    ]
