"""Bytes that a rank will hold at most: weights, gradients and optimizer state exactly, activations about."""

import argparse
from typing import NamedTuple

from hmoe_megatron.config import expert_hidden_size, mtp_layers
from hmoe_megatron.moe.layout import ExpertLayout
from hmoe_megatron.telemetry.accounting import dense_parameters, expert_parameters
from hmoe_megatron.validate_args.activations import FP32, Activations
from hmoe_megatron.validate_args.sizes import expert_tensor_parallel_size


class RankMemory(NamedTuple):
    """Bytes of one rank. stage, rank: of the pipeline and of the expert-parallel group. attention, experts: activations
    that wait for the backward pass. On top of all comes the larger of logits and backward, what the backward pass of a
    layer needs for itself."""

    stage: int
    rank: int
    weights: int
    gradients: int
    optimizer: int
    attention: float
    experts: float
    logits: float
    backward: float

    @property
    def activations(self) -> float:
        return self.attention + self.experts + max(self.logits, self.backward)

    @property
    def total(self) -> float:
        return self.weights + self.gradients + self.optimizer + self.activations


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
    experts = expert_parameters(expert_hidden_size(args), held) // expert_tensor_parallel_size(args)
    replicas = args.data_parallel_size * args.context_parallel_size
    expert_replicas = args.world_size // (
        args.pipeline_model_parallel_size * layout.plan.ranks * expert_tensor_parallel_size(args)
    )
    of_dense, of_experts = _copies(args, replicas), _copies(args, expert_replicas)
    live, activations = _live_micro_batches(args, stage), Activations(args, layout, rank)
    kept = activations.of_layers(layers)
    return RankMemory(
        stage,
        rank,
        *(round(dense * one + experts * other) for one, other in zip(of_dense, of_experts, strict=True)),
        live * (kept.attention + activations.embedding()) + activations.scratch(),
        live * kept.experts,
        activations.logits() if is_last else 0.0,
        activations.backward(layers),
    )


def layers_of(args: argparse.Namespace, stage: int) -> range:
    """Layers of a pipeline stage, those of multi-token prediction with the last. With virtual stages the numbers are
    others, their count is this."""
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
    predicting = len(mtp_layers(args)) if stage == stages - 1 else 0
    return range(sum(counts[:stage]), sum(counts[: stage + 1]) + predicting)


def _expert_width(layout: ExpertLayout, layers: range, rank: int) -> int:
    held = [layer for layer in layers if layer in layout.widths]
    return sum(layout.most_width(layer) or sum(piece.width for piece in layout.pieces(layer)[rank]) for layer in held)


def _copies(args, replicas: int) -> _Copies:
    """Adam's; of fewer moments with other optimizers."""
    is_half = args.bf16 or args.fp16
    weight = 2 if is_half else 4
    gradient = 4 if args.accumulate_allreduce_grads_in_fp32 or not is_half else 2
    state = _moments(args) + (4 if is_half else 0)  # and the fp32 weight
    return _Copies(weight, gradient, state / (replicas if args.use_distributed_optimizer else 1))


def _moments(args) -> int:
    """Bytes of a parameter's moments."""
    return {"adam": 8, "lion": 4, "sgd": 4 if args.sgd_momentum else 0}[args.optimizer]


def _live_micro_batches(args, stage: int) -> float:
    """Whose activations a stage holds at once: 1F1B, or interleaved over virtual stages."""
    stages, chunks = args.pipeline_model_parallel_size, args.virtual_pipeline_model_parallel_size or 1
    count = args.global_batch_size // (args.micro_batch_size * args.data_parallel_size)
    if chunks == 1:
        return min(count, stages - stage)
    return min(count * chunks, 2 * (stages - stage - 1) + (chunks - 1) * stages + 1) / chunks


def moving_bytes(args: argparse.Namespace, layout: ExpertLayout) -> int:
    """The most that a rank has beside all else while experts move (--hmoe-replan-interval): the state of its widest
    layer once more, in fp32, and of its larger matrix, two thirds of it, what is sent, what is received, and where the
    copies share it what it was. 0 where none move."""
    widest = max((layout.most_width(layer) or 0 for layer in layout.layers), default=0)
    held = expert_parameters(expert_hidden_size(args), widest) // expert_tensor_parallel_size(args)
    return round(held * (FP32 + _moments(args)) * (1 + 2 / 3 * (2 + args.use_distributed_optimizer)))


def memory_lines(memory: RankMemory, moving: int = 0) -> list[str]:
    """For people, at most 100 columns. moving: bytes of `moving_bytes`."""
    gib = {name: value / 2**30 for name, value in zip(memory._fields[2:], memory[2:], strict=True)}
    last = "logits" if memory.logits > memory.backward else "backward"
    peak = {"logits": "logits", "backward": "one layer's backward pass"}[last]
    return [
        f" memory of the fullest rank, {memory.total / 2**30:.2f} GiB with even routing (pipeline stage "
        f"{memory.stage}, expert-parallel rank {memory.rank}):",
        f"   weights {gib['weights']:.2f}, gradients {gib['gradients']:.2f}, optimizer {gib['optimizer']:.2f}",
        *([f"   while experts move, between steps, {moving / 2**30:.2f} more at most"] if moving else []),
        f"   activations about {memory.activations / 2**30:.2f}: attention {gib['attention']:.2f}, "
        f"experts {gib['experts']:.2f}, at the peak {peak} {gib[last]:.2f}",
    ]
