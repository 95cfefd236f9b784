"""Training steps of unequal experts beside Megatron's MoE of equal ones: same parameters, same activated FLOPs.

Each model is a process of its own (benchmarks/worker.py). All start together, because imports take most of the time;
one comparison's models are on the card at a time, and are timed in turns.
"""

import statistics
import time
from pathlib import Path
from typing import NamedTuple

from benchmarks.duel import Side, alternate, ratio

COMMON = (
    "--position-embedding-type rope --swiglu --disable-bias-linear --normalization RMSNorm "
    "--untie-embeddings-and-output-weights --hidden-dropout 0 --attention-dropout 0 --lr 1e-4 --min-lr 1e-4 "
    "--lr-decay-style constant --train-iters 100000 --mock-data --tokenizer-type NullTokenizer --vocab-size 32000 "
    "--log-interval 100000 --eval-interval 1000000 --eval-iters 0 --moe-token-dispatcher-type alltoall "
    "--use-distributed-optimizer --dist-ckpt-optim-fully-reshardable "
    # Random routing, as many rows for every expert on both sides.
    "--moe-router-force-load-balancing --moe-router-load-balancing-type none"
)
NO_ENGINE = "--recompute-granularity selective --recompute-modules core_attn"  # without: softmax over S x S is kept


class More(NamedTuple):
    """A third model, timed beside ``ours``. engine: only with Transformer Engine."""

    kind: str
    flags: str
    engine: bool = False


class Model(NamedTuple):
    """of_both: flags. The widths of ours have a mean of ``width``, the width of Megatron's, and are multiples of
    ``multiple``. more: what else is timed, by name."""

    of_both: str
    experts: int
    width: int
    multiple: int
    more: dict[str, More] = {}  # noqa: RUF012  of a NamedTuple, which nobody changes


MODELS = {
    "0.4B": Model(
        "--bf16 --num-layers 12 --hidden-size 768 --num-attention-heads 12 --seq-length 2048 "
        "--max-position-embeddings 2048 --micro-batch-size 8 --global-batch-size 8 --moe-router-topk 2",
        8,
        1536,
        8,
        # Of random probabilities it takes 2.0 experts a token on average, as Top-2 does.
        {"ours, Top-P": More("ours", "--hmoe-router topp --hmoe-top-p 0.46")},
    ),
    "64 experts, 2 layers": Model(
        "--bf16 --num-layers 2 --hidden-size 2048 --num-attention-heads 16 --seq-length 2048 "
        "--max-position-embeddings 2048 --micro-batch-size 4 --global-batch-size 4 --moe-router-topk 6",
        64,
        1408,
        128,
        {"stock, fused permutation": More("stock", "--moe-permute-fusion", engine=True)},
    ),
}
TINY = {
    "tiny": Model(
        "--num-layers 1 --hidden-size 32 --num-attention-heads 2 --seq-length 16 --micro-batch-size 2 "
        "--max-position-embeddings 16 --global-batch-size 2 --moe-router-topk 2 --vocab-size 128",
        4,
        32,
        8,
        {"ours, Top-P": More("ours", "--hmoe-router topp --hmoe-top-p 0.46")},
    )
}
ROUNDS, STEPS, WARM_UP, PARTS_STEPS = 7, 4, 6, 4


def flags(model: Model, kind: str, engine: bool) -> str:
    """Flags of the model as ``kind``, "ours" or "stock"; engine: whether Transformer Engine is there."""
    both = f"{COMMON} {'' if engine else NO_ENGINE} {model.of_both} --num-experts {model.experts}"
    if kind == "ours":
        return (
            f"{both} --hmoe-widths arithmetic:9:23 --hmoe-total-width {model.experts * model.width} "
            f"--hmoe-width-multiple {model.multiple}"
        )
    return f"{both} --moe-ffn-hidden-size {model.width} {'--moe-grouped-gemm' if engine else ''}"


def kinds(model: Model, engine: bool) -> dict[str, tuple[str, str]]:
    """{"ours", "stock", and names of more: (kind, flags)} of what is timed of the model."""
    every = {"ours": More("ours", ""), "stock": More("stock", "")} | model.more
    return {
        name: (of.kind, f"{flags(model, of.kind, engine)} {of.flags}")
        for name, of in every.items()
        if engine or not of.engine
    }


def start(engine: bool, models: dict[str, Model], logs: Path) -> dict[str, dict[str, Side]]:
    """{model: {name of ``kinds``: Side}}, on their way up, without a model yet."""
    return {
        name: {
            which: Side(f"{name}, {which}", kind, of, logs / f"steps_{number}_{place}.log")
            for place, (which, (kind, of)) in enumerate(kinds(model, engine).items())
        }
        for number, (name, model) in enumerate(models.items())
    }


def build(model: str, kind: str, side: Side, emit) -> float:
    """Emits what starting took; returns the seconds to the first loss."""
    ready_s = side.ready()["ready_s"]
    built, first = side.ask("build"), side.ask("step", count=1)
    to_first_loss_s = ready_s + built["set_up_s"] + first["ms"][0] / 1e3
    emit(
        model=model,
        side=kind,
        build_s=built["build_s"],
        expert_parameters=built["expert_parameters"],
        to_first_loss_s=to_first_loss_s,
        first_step_ms=first["ms"][0],
        first_loss=first["losses"][0],
    )
    return to_first_loss_s


def time_beside(model: str, what: str, sides: dict[str, Side], emit, tiny: bool) -> None:
    """Emits the first side's step time over the second's."""
    rounds, steps, warm_up = (2, 1, 1) if tiny else (ROUNDS, STEPS, WARM_UP)
    for side in sides.values():
        side.ask("step", count=warm_up)
    medians = alternate(
        {kind: lambda side=side: side.ask("step", count=steps)["ms"] for kind, side in sides.items()}, rounds
    )
    first, second = sides
    middle, least, most = ratio(medians, first, second)
    emit(
        model=model,
        what=what,
        ratio=middle,
        least=least,
        most=most,
        ms={kind: statistics.median(of) for kind, of in medians.items()},
    )


def compare(model: str, sides: dict[str, Side], emit, tiny: bool = False) -> None:
    """Emits what starting took, step times, their ratio, losses, memory, parts of a step and the longest kernels; then
    the same of what else is timed, whose failure costs only itself."""
    two = {kind: sides[kind] for kind in ("ours", "stock")}
    began = {kind: build(model, kind, side, emit) for kind, side in two.items()}
    emit(model=model, what="to the first loss, ours over Megatron's", ratio=began["ours"] / began["stock"])
    time_beside(model, "step, ours over Megatron's", two, emit, tiny)
    for kind, side in two.items():
        look_inside(model, kind, side, emit, tiny)
    sides["stock"].__exit__()  # three would not fit
    for kind, side in sides.items():
        if kind not in two:
            try:
                build(model, kind, side, emit)
                time_beside(model, f"step, ours over {kind}", {"ours": sides["ours"], kind: side}, emit, tiny)
                look_inside(model, kind, side, emit, tiny)
            except RuntimeError as error:
                emit(model=model, side=kind, failed=str(error)[-1500:])
            side.__exit__()


def look_inside(model: str, kind: str, side: Side, emit, tiny: bool) -> None:
    of = {} if kind.startswith("stock") else side.ask("experts_a_token")
    emit(model=model, side=kind, **side.ask("parts", count=1 if tiny else PARTS_STEPS), **side.ask("memory"), **of)
    emit(model=model, side=kind, **side.ask("kernels"))


def compare_or_say(model: str, sides: dict[str, Side], emit, tiny: bool = False) -> None:
    """``compare``; a side that dies costs its model only. Ends the model's processes."""
    begun = time.monotonic()
    try:
        compare(model, sides, emit, tiny)
    except RuntimeError as error:
        emit(model=model, failed=str(error)[-1500:])
    for side in sides.values():
        side.__exit__()
    emit(model=model, seconds=time.monotonic() - begun)
