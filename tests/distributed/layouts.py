"""The parallel layouts that are tested, as data: test_layouts.py runs them, docs/parallelism.md shows them.

    python -m tests.distributed.layouts > docs/parallelism.md
"""

import dataclasses

from hmoe_megatron.host import flags as host_flags

# What a layout is put together from. EP1, ETP of TP's size and alltoall or allgather as Megatron has them by default.
WORDS = {
    "TP2": "--tensor-model-parallel-size 2 --sequence-parallel",
    "TP4": "--tensor-model-parallel-size 4 --sequence-parallel",
    "ETP1": "--expert-tensor-parallel-size 1",
    "ETP2": "--expert-tensor-parallel-size 2",
    "PP2": "--pipeline-model-parallel-size 2",
    "PP4": "--pipeline-model-parallel-size 4",
    "VPP2": "--num-virtual-stages-per-pipeline-rank 2",
    "EP2": "--expert-model-parallel-size 2",
    "EP4": "--expert-model-parallel-size 4",
    "EP8": "--expert-model-parallel-size 8",
    "DO": "--use-distributed-optimizer",
    "overlap": "--overlap-grad-reduce --overlap-param-gather --ddp-bucket-size 4096",
    "overlap-reduce": "--overlap-grad-reduce --ddp-bucket-size 4096",
    "alltoall": "--moe-token-dispatcher-type alltoall",
    "allgather": "--moe-token-dispatcher-type allgather",
    "recompute-full": "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1",
    "recompute-block": "--recompute-granularity full --recompute-method block --recompute-num-layers 1",
    "recompute-moe": "--recompute-granularity selective --recompute-modules moe",
    "recompute-rest": "--recompute-granularity selective --recompute-modules core_attn shared_experts",
}
# The same model whatever the layout: a run on one rank has these words too.
MODEL_WORDS = {
    "bf16": "--bf16",
    "Top-P": "--hmoe-router topp --hmoe-top-p 0.6",
    "4-layers": "--num-layers 4",
    "micro-batch-1": "--micro-batch-size 1",
    "shared-expert": "--moe-shared-expert-intermediate-size 24",
}


@dataclasses.dataclass(frozen=True)
class Layout:
    """words: of WORDS and MODEL_WORDS. suite: run by `make test` too, not by `make layouts` only."""

    ranks: int
    words: str
    suite: bool = False

    @property
    def flags(self) -> str:
        return " ".join((WORDS | MODEL_WORDS)[word] for word in self.words.split())

    @property
    def model_flags(self) -> str:
        return " ".join(MODEL_WORDS[word] for word in self.words.split() if word in MODEL_WORDS)

    @property
    def expert_parallel(self) -> int:
        sizes = [int(word[2:]) for word in self.words.split() if word in ("EP2", "EP4", "EP8")]
        return sizes[0] if sizes else 1

    @property
    def num_layers(self) -> int:
        return 4 if "4-layers" in self.words.split() else 2

    def __str__(self):
        return f"{self.ranks}: {self.words}"


def _layouts(in_suite: str, campaign: str) -> list[Layout]:
    """Lines of `ranks: words`."""
    rows = [(line, True) for line in in_suite.splitlines()] + [(line, False) for line in campaign.splitlines()]
    return [Layout(int(line.split(":")[0]), line.split(":")[1].strip(), suite) for line, suite in rows if line.strip()]


# Equal widths, --hmoe-gemm-backend reference, no P-Penalty: Megatron's own MoE with SequentialMLP under the same flags.
AGAINST_STOCK = _layouts(
    """
    2: TP2
    2: TP2 EP2 ETP1
    2: PP2
    2: 4-layers PP2 VPP2
    2: EP2 bf16
    2: DO
    4: TP2 EP2 ETP2 alltoall
    4: PP2 EP2
    4: EP2 DO overlap alltoall bf16
    """,
    """
    2: EP2 alltoall
    2: EP2 allgather
    2: EP2 recompute-full
    2: EP2 recompute-block alltoall
    2: EP2 recompute-moe
    2: shared-expert EP2 recompute-rest alltoall
    2: overlap-reduce
    2: DO overlap
    2: TP2 bf16
    2: PP2 bf16
    4: EP4
    4: EP4 alltoall
    4: EP2 DO bf16 alltoall
    4: EP2 DO overlap
    4: TP2 PP2
    4: TP2 EP4 ETP1 alltoall
    4: TP2 EP2 ETP2 allgather
    4: TP4
    4: 4-layers PP4
    4: 4-layers PP2 VPP2 EP2 alltoall
    4: TP2 DO overlap
    4: TP2 EP2 ETP1 recompute-full DO
    8: TP2 PP2 EP2 ETP1 DO overlap alltoall
    8: TP2 PP2 EP2 ETP2 DO alltoall bf16
    8: micro-batch-1 4-layers PP2 VPP2 EP2 DO overlap
    8: 4-layers PP4 EP2 alltoall
    8: TP2 EP4 ETP1 DO overlap
    8: TP4 EP4 ETP2 alltoall
    8: micro-batch-1 EP4 DO overlap recompute-moe alltoall
    """,
)

# Widths 16, 32, 48, 64, experts cut by width wherever EP > 1, P-Penalty on: one rank with whole experts.
AGAINST_ONE_RANK = _layouts(
    """
    2: EP2 alltoall
    2: Top-P EP2 allgather
    2: 4-layers PP2 VPP2
    4: Top-P TP2 EP2 ETP2 alltoall
    4: PP2 EP2 recompute-full
    4: Top-P EP2 DO overlap alltoall
    8: Top-P TP2 PP2 EP2 ETP1 DO overlap alltoall
    """,
    """
    2: TP2
    2: TP2 ETP1
    2: PP2
    2: DO overlap
    2: overlap-reduce
    2: EP2 allgather
    2: Top-P EP2 alltoall
    2: EP2 recompute-moe
    2: shared-expert EP2 recompute-rest alltoall
    2: Top-P EP2 recompute-full alltoall
    2: EP2 bf16
    2: Top-P TP2 EP2 ETP1 bf16 alltoall
    4: EP4 alltoall
    4: Top-P EP4 allgather
    4: TP2 EP2 ETP1 alltoall
    4: TP2 EP2 ETP2 allgather
    4: TP2 EP4 ETP1
    4: TP4 EP2 ETP2 alltoall
    4: TP2 PP2
    4: TP2 EP2 ETP1 DO overlap recompute-moe
    4: EP2 overlap-reduce
    4: 4-layers PP4 Top-P
    4: 4-layers PP2 VPP2 EP2 alltoall
    4: Top-P PP2 EP2 DO overlap bf16
    8: micro-batch-1 DO overlap
    8: micro-batch-1 EP8 alltoall
    8: micro-batch-1 Top-P EP8 DO overlap allgather
    8: TP2 PP2 EP2 ETP2 alltoall
    8: TP2 EP4 ETP1 DO overlap alltoall
    8: Top-P TP4 EP4 ETP2 alltoall
    8: micro-batch-1 4-layers PP2 VPP2 EP2 DO overlap
    8: 4-layers Top-P PP4 EP2 alltoall recompute-full
    8: 4-layers TP2 PP2 VPP2 EP2 ETP1 DO overlap recompute-moe
    8: micro-batch-1 Top-P EP4 DO overlap bf16 alltoall
    """,
)

# Relative, over five steps. fp32: the ranks' sums are added in another order, and a clipped step scales all of it.
LOSS_BOUND, NORM_BOUND = 1e-5, 3e-5
# Adam moves a weight by up to 1e-2 a step whatever its gradient's size, so the smallest gradients show most.
WEIGHT_BOUND = 2e-4
# bf16 keeps 8 bits, is rounded where ranks add up, and moves a token to another expert now and then.
BF16_LOSS_BOUND, BF16_NORM_BOUND = 2e-3, 5e-2


def parallelism_document() -> str:
    return ""
