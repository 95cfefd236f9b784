"""The layers and ranks that a model's flags describe, as far as a placement asks for them.

Letters: L MoE layers, E logical experts.
"""

import ast
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from hmoe_megatron.config import expert_hidden_size, hmoe_config_from_args, moe_layers, widths_from_args
from hmoe_megatron.placement.ranks import MAX_RANKS
from hmoe_megatron.telemetry.accounting import expected_active_width
from hmoe_megatron.tools.plan_tool.model_flags import SIZES, parse
from hmoe_megatron.untrusted import shown

MAX_SIZE = 1 << 40
MAX_PATTERN = 1 << 16  # layers, and characters of --moe-layer-freq


@dataclass(frozen=True)
class Model:
    """layers: decoder layer of each row of widths_LE; stages: its pipeline stage.

    ranks: expert-parallel ranks, of expert_tp GPUs each; tokens: of one micro-batch of the whole expert-parallel group;
    experts_per_token: expected for even routing, [L]; live_micro_batches: whose activations a stage holds at once.
    """

    layers: tuple[int, ...]
    widths_LE: tuple[tuple[int, ...], ...]
    stages: tuple[int, ...]
    hidden_size: int | None
    ranks: int
    expert_tp: int
    tokens: float
    experts_per_token: tuple[float, ...]
    live_micro_batches: float
    max_cuts: int | None
    cut_multiple: int

    def even_loads(self) -> list[np.ndarray]:
        """tokens_LE: rows of each expert in one micro-batch if all experts are equally likely."""
        return [
            np.full(len(widths), self.tokens * chosen / len(widths))
            for widths, chosen in zip(self.widths_LE, self.experts_per_token, strict=True)
        ]


def model_of(words: Sequence[str], more: Sequence[str]) -> Model:
    """The model of flags from a file, whose flags that matter to training only are skipped, and of `more` flags.

    Raises ValueError with flag, value and remedy, also for any of `more` that is not known here.
    """
    unknown = parse(more)[1] + [word for word in more if word.startswith("--hmoe-placement")]
    if unknown:
        raise ValueError(f"{' '.join(unknown):.200}: not a flag that a placement depends on; see --help")
    args = parse([*words, *more, "--hmoe-placement", "auto"])[0]
    if missing := [
        flag
        for flag in ("--num-experts", "--expert-model-parallel-size")
        if getattr(args, flag[2:].replace("-", "_")) is None
    ]:
        raise ValueError(f"{' and '.join(missing)}: give the size, or a file that has it (--args, --run)")
    for flag in SIZES:
        value = getattr(args, flag[2:].replace("-", "_"))
        most = MAX_RANKS if flag.endswith("-parallel-size") else MAX_SIZE
        least = 0 if flag == "--mtp-num-layers" else 1
        if value is not None and not least <= value <= most:
            raise ValueError(f"{flag} {shown(value)}: give a whole number from {least} to {most}")
    args.moe_layer_freq = _layer_pattern(args.moe_layer_freq)
    settings = hmoe_config_from_args(args)
    widths = widths_from_args(args, settings)
    expert_tp = args.expert_tensor_parallel_size or args.tensor_model_parallel_size
    gpus = args.expert_model_parallel_size * expert_tp
    stages = args.pipeline_model_parallel_size
    return Model(
        layers=tuple(widths),
        widths_LE=tuple(widths.values()),
        stages=_stages(tuple(moe_layers(args)), args.num_layers, stages),
        hidden_size=expert_hidden_size(args),
        ranks=args.expert_model_parallel_size,
        expert_tp=expert_tp,
        tokens=gpus
        * args.micro_batch_size
        * args.seq_length
        / (args.tensor_model_parallel_size * args.context_parallel_size),
        experts_per_token=tuple(
            expected_active_width(settings, args.moe_router_topk, of) * len(of) / sum(of) for of in widths.values()
        ),
        live_micro_batches=0.0 if args.recompute_granularity == "full" else float(stages),
        max_cuts=settings.max_cuts,
        cut_multiple=settings.cut_multiple * expert_tp,
    )


def _layer_pattern(text: str) -> int | list[int]:
    """--moe-layer-freq as Megatron takes it: a number, or an expression of lists such as ([0]*3+[1]*58)."""
    try:
        value = _value(ast.parse(text.strip()[:MAX_PATTERN], mode="eval").body)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        value = None
    if type(value) is int and value >= 1 or type(value) is list and value and all(x in (0, 1) for x in value):
        return value
    raise ValueError(f"--moe-layer-freq {text:.80}: give a number, or 0 and 1 for the layers, such as [0]*3+[1]*58")


def _value(node: ast.expr) -> int | list[int]:
    """Of whole numbers, lists of them, + and *; nothing is evaluated. Raises ValueError for all else."""
    match node:
        case ast.Constant(value=int(number)) if type(number) is int:
            return number
        case ast.List(elts=items):
            return [_value(item) for item in items]
        case ast.BinOp(op=ast.Add(), left=left, right=right):
            first, second = _value(left), _value(right)
            if type(first) is type(second) is list:
                return first + second
        case ast.BinOp(op=ast.Mult(), left=left, right=right):
            items, times = sorted((_value(left), _value(right)), key=lambda value: type(value) is int)
            if type(items) is list and type(times) is int and len(items) * times <= MAX_PATTERN:
                return items * times
    raise ValueError


def _stages(layers: tuple[int, ...], num_layers: int, stages: int) -> tuple[int, ...]:
    if num_layers % stages:
        raise ValueError(
            f"--num-layers {num_layers} does not divide by --pipeline-model-parallel-size {stages}: "
            "stages of unequal size are not known here; plan each stage's layers on their own"
        )
    return tuple(min(layer // (num_layers // stages), stages - 1) for layer in layers)
