"""Training steps of unequal experts beside Megatron's MoE of equal ones: same parameters, same activated FLOPs.

Each model is a process of its own (benchmarks/worker.py); all start together, because imports and set-up take most of
the time, and are timed in turns.
"""

import contextlib
import statistics
import time
from pathlib import Path

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
# Model: flags of both, widths of ours, the equal width of Megatron's.
MODELS = {
    "0.4B": (
        "--bf16 --num-layers 12 --hidden-size 768 --num-attention-heads 12 --seq-length 2048 "
        "--max-position-embeddings 2048 --micro-batch-size 8 --global-batch-size 8 --num-experts 8 "
        "--moe-router-topk 2", 12288, 1536,
    ),
    "64 experts, 2 layers": (
        "--bf16 --num-layers 2 --hidden-size 2048 --num-attention-heads 16 --seq-length 2048 "
        "--max-position-embeddings 2048 --micro-batch-size 4 --global-batch-size 4 --num-experts 64 "
        "--moe-router-topk 6", 64 * 1408, 1408,
    ),
}  # fmt: skip
TINY = {
    "tiny": ("--num-layers 1 --hidden-size 32 --num-attention-heads 2 --seq-length 16 --max-position-embeddings 16 "
             "--micro-batch-size 2 --global-batch-size 2 --num-experts 4 --moe-router-topk 2 --vocab-size 128",
             4 * 32, 32),
}  # fmt: skip
ROUNDS, STEPS, WARM_UP, PARTS_STEPS = 7, 4, 6, 4


def flags(model: str, kind: str, engine: bool, models: dict) -> str:
    """Flags of the model as ``kind``, "ours" or "stock"; engine: whether Transformer Engine is there."""
    of_both, total, equal = models[model]
    if kind == "ours":
        return f"{COMMON} {of_both} --hmoe-widths arithmetic:9:23 --hmoe-total-width {total} --hmoe-width-multiple 8"
    grouped = "--moe-grouped-gemm" if engine else ""
    return f"{COMMON} {of_both} --moe-ffn-hidden-size {equal} {grouped}"


@contextlib.contextmanager
def started(engine: bool, models: dict, logs: Path):
    """{model: {"ours": Side, "stock": Side}}, on their way up."""
    with contextlib.ExitStack() as stack:
        yield {
            model: {
                kind: stack.enter_context(
                    Side(f"{model}, {kind}", kind, flags(model, kind, engine, models), logs / f"{number}_{kind}.log")
                )
                for kind in ("ours", "stock")
            }
            for number, model in enumerate(models)
        }  # fmt: skip


def compare(model: str, sides: dict[str, Side], emit, tiny: bool = False) -> None:
    """Emits what starting took, step times, their ratio, losses, memory, parts of a step and the longest kernels."""
    began = {}
    for kind, side in sides.items():
        ready = side.ready()
        first = side.ask("step", count=1)
        began[kind] = ready["ready_s"] + first["ms"][0] / 1e3
        emit(model=model, side=kind, build_s=ready["build_s"], expert_parameters=ready["expert_parameters"],
             to_first_loss_s=began[kind], first_step_ms=first["ms"][0], first_loss=first["losses"][0])  # fmt: skip
    emit(model=model, what="to the first loss, ours over Megatron's", ratio=began["ours"] / began["stock"])
    rounds, steps, warm_up = (2, 1, 1) if tiny else (ROUNDS, STEPS, WARM_UP)
    for side in sides.values():
        side.ask("step", count=warm_up)
    medians = alternate({kind: lambda side=side: side.ask("step", count=steps)["ms"] for kind, side in sides.items()},
                        rounds)  # fmt: skip
    middle, least, most = ratio(medians, "ours", "stock")
    emit(model=model, what="step, ours over Megatron's", ratio=middle, least=least, most=most,
         ours_ms=statistics.median(medians["ours"]), stock_ms=statistics.median(medians["stock"]))  # fmt: skip
    for kind, side in sides.items():
        emit(model=model, side=kind, **side.ask("parts", count=1 if tiny else PARTS_STEPS), **side.ask("memory"))
        emit(model=model, side=kind, **side.ask("kernels"))


def compare_all(engine: bool, models: dict, logs: Path, emit, tiny: bool = False) -> None:
    """``compare`` of every model; a side that dies costs its model only. Ends a model's processes when it is done."""
    with started(engine, models, logs) as of:
        for model, sides in of.items():
            begun = time.monotonic()
            try:
                compare(model, sides, emit, tiny)
            except RuntimeError as error:
                emit(model=model, failed=str(error)[-1500:])
            for side in sides.values():
                side.__exit__()
            emit(model=model, seconds=time.monotonic() - begun)
