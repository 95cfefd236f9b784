"""Runs for machines with GPUs, as data: test_training_on_gpu.py does them, a test without a GPU checks their flags.

Nobody has run them yet: this project was written on machines without a GPU.
"""

import dataclasses

# Heads of 64 and sizes that divide by FP8's tiles.
MODEL = (
    "--num-layers 2 --hidden-size 256 --num-attention-heads 4 --seq-length 128 --max-position-embeddings 128 "
    "--position-embedding-type rope --swiglu --disable-bias-linear --normalization RMSNorm "
    "--untie-embeddings-and-output-weights --num-experts 4 --moe-router-topk 2 --hidden-dropout 0 "
    "--attention-dropout 0 --micro-batch-size 2 --global-batch-size 8 --lr 1e-3 --min-lr 1e-3 "
    "--lr-decay-style constant --train-iters 20 --seed 1234 --mock-data --tokenizer-type NullTokenizer "
    "--vocab-size 512 --make-vocab-size-divisible-by 1 --log-interval 1 --eval-interval 1000 --eval-iters 0 "
    "--dist-ckpt-optim-fully-reshardable --use-cpu-initialization --hmoe-widths 64,128,192,256"
)
TE = "--transformer-impl transformer_engine"
# Without Transformer Engine and Apex: their fused kernels off.
LOCAL = "--transformer-impl local --no-gradient-accumulation-fusion --no-persist-layer-norm --no-rope-fusion"
TOPP = "--hmoe-router topp --hmoe-top-p 0.6"
EP2 = "--expert-model-parallel-size 2"
FLEX = f"{LOCAL} {EP2} --bf16 --moe-token-dispatcher-type flex --moe-flex-dispatcher-backend"
ALLTOALL = f"{LOCAL} {EP2} --bf16 --moe-token-dispatcher-type alltoall"
FP8 = f"{TE} --bf16 --fp8-format hybrid"
TP2 = "--tensor-model-parallel-size 2 --sequence-parallel"
# Relative, of the loss over twenty steps. Guesses: to be set by who runs them first.
FP32_BOUND, BF16_BOUND, FP8_BOUND = 1e-3, 1e-2, 5e-2


@dataclasses.dataclass(frozen=True)
class Run:
    """flags and against: of two runs whose losses are compared; no against: the losses must fall. needs: modules."""

    name: str
    gpus: int
    flags: str
    against: str | None = None
    against_gpus: int = 1
    bound: float = BF16_BOUND
    needs: tuple[str, ...] = ()
    capability: tuple[int, int] = (0, 0)


_TE, _DEEPEP = "transformer_engine_torch", "deep_ep"
RUNS = (
    Run("local", 1, LOCAL),
    Run("Top-P", 1, f"{LOCAL} {TOPP}"),
    Run("TE", 1, f"{TE} {TOPP} --bf16", needs=(_TE,)),
    Run("TE against local", 1, TE, LOCAL, bound=FP32_BOUND, needs=(_TE,)),
    Run("FP8", 1, FP8, f"{TE} --bf16", bound=FP8_BOUND, needs=(_TE,), capability=(8, 9)),
    Run("FP8, recomputed", 1, f"{FP8} --recompute-granularity selective --recompute-modules moe", FP8, needs=(_TE,),
        capability=(8, 9)),
    Run("EP2", 2, f"{LOCAL} {EP2}", LOCAL, bound=FP32_BOUND),
    Run("TP2", 2, f"{LOCAL} {TP2}", LOCAL, bound=FP32_BOUND),
    Run("PP2", 2, f"{LOCAL} --pipeline-model-parallel-size 2"),
    Run("CP2", 2, f"{TE} --bf16 --context-parallel-size 2", f"{TE} --bf16", needs=(_TE,)),
    Run("CP2, EP2, Top-P", 2, f"{TE} {TOPP} {EP2} --bf16 --context-parallel-size 2", f"{TE} {TOPP} --bf16",
        needs=(_TE,)),
    Run("flex, DeepEP", 2, f"{FLEX} deepep", ALLTOALL, 2, needs=(_DEEPEP,)),
    Run("flex, DeepEP, Top-P", 2, f"{FLEX} deepep {TOPP}", f"{ALLTOALL} {TOPP}", 2, needs=(_DEEPEP,)),
    Run("flex, HybridEP", 2, f"{FLEX} hybridep", ALLTOALL, 2, needs=(_DEEPEP,)),
    Run("flex, HybridEP, Top-P", 2, f"{FLEX} hybridep {TOPP}", f"{ALLTOALL} {TOPP}", 2, needs=(_DEEPEP,)),
    Run("distributed optimizer with TE's Adam", 2,
        f"{TE} --bf16 --use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather", f"{TE} --bf16", 2,
        needs=(_TE,)),
)  # fmt: skip
