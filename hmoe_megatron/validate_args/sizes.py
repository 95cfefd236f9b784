"""Numbers that can't be, and sizes that the ranks of this run do not hold. Megatron meets most of them late, in an
assertion that says little."""

import argparse
import math
from collections.abc import Iterator

from hmoe_megatron.flag_files import flag_named

_AT_LEAST_1 = (
    "num_layers hidden_size ffn_hidden_size num_attention_heads num_query_groups kv_channels seq_length "
    "max_position_embeddings micro_batch_size global_batch_size num_experts moe_router_topk "
    "tensor_model_parallel_size pipeline_model_parallel_size context_parallel_size expert_model_parallel_size "
    "expert_tensor_parallel_size train_iters train_samples save_interval log_interval eval_interval vocab_size "
    "padded_vocab_size make_vocab_size_divisible_by exit_interval"
).split()
_AT_LEAST_0 = (
    "eval_iters num_workers lr_warmup_iters lr_warmup_samples lr_decay_iters lr_decay_samples min_lr weight_decay "
    "clip_grad attention_dropout hidden_dropout adam_eps init_method_std lr_warmup_init"
).split()
_NEEDED = ("num_layers", "hidden_size", "num_attention_heads", "seq_length", "micro_batch_size")


def expert_tensor_parallel_size(args: argparse.Namespace) -> int:
    """``--expert-tensor-parallel-size``, whose default is the size of tensor parallelism."""
    return args.expert_tensor_parallel_size or args.tensor_model_parallel_size


def pad_vocabulary(args: argparse.Namespace) -> None:
    """Round --padded-vocab-size up to a multiple of the tensor-parallel size, which Megatron takes as it is."""
    if args.padded_vocab_size and args.tensor_model_parallel_size > 0:
        size = args.tensor_model_parallel_size
        args.padded_vocab_size = -(-args.padded_vocab_size // size) * size


def number_problems(args: argparse.Namespace) -> Iterator[str]:
    """A phrase for each flag that is missing or out of its range."""
    for name in _NEEDED:
        if getattr(args, name) is None:
            yield f"{flag_named(name)} is missing: give it"
    for names, least, words in ((_AT_LEAST_1, 1, "of at least 1"), (_AT_LEAST_0, 0, "of at least 0")):
        for name in names:
            value = getattr(args, name, None)
            if isinstance(value, int | float) and not (math.isfinite(value) and value >= least):
                yield f"{flag_named(name)} {value}: give a number {words}"
    if args.train_iters is None and args.train_samples is None:
        yield "--train-iters is missing: give the number of steps, or --train-samples"
    if args.lr is None:
        yield "--lr is missing: give the learning rate"
    elif not (math.isfinite(args.lr) and args.lr > 0):
        yield f"--lr {args.lr}: give a number above 0"
    elif (args.min_lr or 0) > args.lr:
        yield f"--min-lr {args.min_lr} is above --lr {args.lr}: lower it"
    yield from _warm_up_problems(args)
    if args.save and args.save_interval is None:
        yield "--save without --save-interval: nothing is saved before the end: give the steps between checkpoints"


def _warm_up_problems(args) -> Iterator[str]:
    """Megatron's scheduler wants the warm-up to end before the decay does, and to begin below the learning rate."""
    unit = "iters" if args.train_iters else "samples"
    warm_up, decay = getattr(args, f"lr_warmup_{unit}", 0) or 0, getattr(args, f"lr_decay_{unit}", None)
    decay = decay or getattr(args, f"train_{unit}") or 0
    if decay and warm_up >= decay:
        yield (
            f"--lr-warmup-{unit} {warm_up} is not below the {decay} {unit} of the decay (--lr-decay-{unit}, by default "
            f"--train-{unit}): lower it, or train longer"
        )
    if args.lr is not None and (getattr(args, "lr_warmup_init", 0) or 0) > args.lr:
        yield f"--lr-warmup-init {args.lr_warmup_init} is above --lr {args.lr}: lower it"


def layout_problems(args: argparse.Namespace) -> Iterator[str]:
    """A phrase for each size of parallelism that `args.world_size` ranks do not hold, or that does not divide."""
    tensor, pipeline, context = (
        args.tensor_model_parallel_size,
        args.pipeline_model_parallel_size,
        args.context_parallel_size,
    )
    sizes = {"--tensor-model-parallel-size": tensor, "--pipeline-model-parallel-size": pipeline}
    dense = sizes | {"--context-parallel-size": context}
    experts = {
        "--expert-model-parallel-size": args.expert_model_parallel_size,
        "--expert-tensor-parallel-size": expert_tensor_parallel_size(args),
        "--pipeline-model-parallel-size": pipeline,
    }
    for group in (dense, experts):
        needed = math.prod(group.values())
        if needed > 0 and args.world_size % needed:
            given = " x ".join(f"{flag} {size}" for flag, size in group.items() if size > 1)
            yield (
                f"{given} needs {needed} ranks or a multiple, and {_are(args.world_size)}: start the run with "
                f"torchrun --nproc-per-node {needed} pretrain_hmoe.py ... (with --nnodes on several machines), or "
                "give a smaller size"
            )
    if tensor > 1 and not args.sequence_parallel:
        yield (
            f"--tensor-model-parallel-size {tensor} without --sequence-parallel: Megatron trains no experts so: add it"
        )
    if context > 1 and args.seq_length and args.seq_length % (2 * context):
        yield (
            f"--seq-length {args.seq_length} does not divide by twice the --context-parallel-size {context}: give a "
            f"multiple of {2 * context}"
        )
    elif args.sequence_parallel and args.seq_length and args.seq_length % (tensor * context):
        yield (
            f"--seq-length {args.seq_length} does not divide by the --tensor-model-parallel-size {tensor}, over which "
            f"--sequence-parallel cuts it: give a multiple of {tensor * context}, or leave --sequence-parallel out"
        )


def _are(ranks: int) -> str:
    return "there is one" if ranks == 1 else f"there are {ranks}"
