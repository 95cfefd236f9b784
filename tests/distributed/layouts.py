"""The parallel layouts that are tested, as data: test_layouts.py runs them, docs/parallelism.md shows them.

python -m tests.distributed.layouts > docs/parallelism.md
"""

import dataclasses

from benchmarks.gpu.runs import LOCAL, RUNS, TE
from hmoe_megatron.machine.flags import cpu_argv
from tests.distributed.training_run import ONE_ULP

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
    "overlap-dispatch": "--overlap-moe-expert-parallel-comm",
    "recompute-rest": "--recompute-granularity selective --recompute-modules core_attn shared_experts",
}
# The same model whatever the layout: a run on one rank has these words too.
MODEL_WORDS = {
    "bf16": "--bf16",
    "Top-P": "--hmoe-router topp --hmoe-top-p 0.6",
    "4-layers": "--num-layers 4",
    "micro-batch-1": "--micro-batch-size 1",
    "MLA": (
        "--multi-latent-attention --q-lora-rank 16 --kv-lora-rank 24 --qk-head-dim 8 --qk-pos-emb-head-dim 4 "
        "--v-head-dim 8 --qk-layernorm --rope-type rope"
    ),
    "yarn": "--rope-type yarn --rotary-scaling-factor 4 --mscale 1.0 --mscale-all-dim 1.0",
    "gated-attention": "--attention-output-gate",
    "MTP": "--mtp-num-layers 2",
    "capacity": "--moe-expert-capacity-factor 0.75 --moe-router-load-balancing-type none",
    "own-spec": "--spec tests.distributed.own_specs halved",
    "padded": "--moe-pad-expert-input-to-capacity",
    "repeated-MTP": "--mtp-num-layers 2 --mtp-use-repeated-layer",
    "latent-experts": "--moe-latent-size 16",
    "clamped-SwiGLU": "--activation-func-clamp-value 0.5 --glu-linear-offset 1.0",
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
    def cuts_elsewhere(self) -> bool:
        """Whether the distributed optimizer shares an expert among ranks. It then cuts our one tensor a layer and
        matrix in other places than Megatron's one an expert, and sums of squares are of other parts."""
        given = {word[:-1]: int(word[-1]) for word in self.words.split() if word[-1].isdigit()}
        sizes = {"TP": 1, "PP": 1, "EP": 1} | given
        return "DO" in self.words.split() and self.ranks > sizes["EP"] * sizes["PP"] * sizes.get("ETP", sizes["TP"])

    @property
    def bf16(self) -> bool:
        return "bf16" in self.words.split()

    @property
    def predicting(self) -> str | None:
        """The word of it that has multi-token prediction."""
        return next((word for word in self.words.split() if word.endswith("MTP")), None)

    @property
    def num_layers(self) -> int:
        return (4 if "4-layers" in self.words.split() else 2) + {"MTP": 2, "repeated-MTP": 1}.get(self.predicting, 0)

    def __str__(self):
        return f"{self.ranks}: {self.words}"


def _layouts(in_suite: str, campaign: str) -> list[Layout]:
    """Lines of `ranks: words`."""
    rows = [(line, True) for line in in_suite.splitlines()] + [(line, False) for line in campaign.splitlines()]
    return [Layout(int(line.split(":")[0]), line.split(":")[1].strip(), suite) for line, suite in rows if line.strip()]


# Equal widths, --hmoe-gemm-backend reference, no P-Penalty: Megatron's own MoE with SequentialMLP under the same flags.
AGAINST_STOCK = _layouts(
    """
    2: TP2 EP2 ETP1
    2: 4-layers PP2 VPP2
    2: EP2 bf16
    4: TP2 EP2 ETP2 alltoall
    4: EP2 DO overlap alltoall bf16
    """,
    """
    2: TP2
    2: PP2
    2: DO
    2: MLA TP2
    2: MLA yarn EP2
    2: MTP TP2
    2: MTP PP2
    2: MTP EP2 alltoall
    2: MLA PP2
    2: MLA EP2 bf16 alltoall
    2: gated-attention TP2 EP2 ETP1
    4: PP2 EP2
    2: EP2 alltoall
    2: EP2 allgather
    2: EP2 recompute-full
    2: capacity EP2 alltoall
    2: capacity TP2
    2: capacity padded EP2 alltoall
    2: own-spec EP2
    2: clamped-SwiGLU shared-expert EP2
    2: repeated-MTP EP2 alltoall
    2: latent-experts shared-expert EP2 alltoall
    4: latent-experts TP2 EP2 ETP2 bf16
    2: EP2 bf16 overlap-dispatch alltoall
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
    2: MLA TP2 EP2 ETP1 DO overlap
    2: MTP EP2 alltoall
    2: Top-P EP2 allgather
    2: capacity EP2 alltoall
    4: PP2 EP2 recompute-full
    8: Top-P TP2 PP2 EP2 ETP1 DO overlap alltoall
    """,
    """
    2: 4-layers PP2 VPP2
    4: Top-P TP2 EP2 ETP2 alltoall
    4: Top-P EP2 DO overlap alltoall
    2: TP2
    2: TP2 ETP1
    2: PP2
    2: DO overlap
    2: overlap-reduce
    2: EP2 allgather
    2: Top-P EP2 alltoall
    4: MLA TP2 EP2 ETP2 alltoall
    2: MLA PP2
    2: MLA yarn TP2 EP2 ETP1
    2: MTP PP2
    4: MTP MLA TP2 EP2 ETP1 DO overlap alltoall
    2: gated-attention EP2
    2: EP2 recompute-moe
    2: shared-expert EP2 recompute-rest alltoall
    2: Top-P EP2 recompute-full alltoall
    2: Top-P capacity EP2 allgather
    2: clamped-SwiGLU EP2
    2: own-spec MTP PP2
    2: repeated-MTP EP2 alltoall DO overlap
    2: latent-experts EP2 alltoall
    4: latent-experts TP2 EP2 ETP1 DO overlap
    2: EP2 bf16 overlap-dispatch alltoall
    4: 4-layers PP2 VPP2 EP2 bf16 overlap-dispatch alltoall DO overlap
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


# Flags that need a GPU, and what a test without one runs of them.
NEEDS_GPU = (
    ("--context-parallel-size 2", "batches, router losses and counts, with a stand-in for the attention"),
    ("--moe-token-dispatcher-type flex", "Megatron's managers of DeepEP and HybridEP, with a stand-in for the kernels"),
    ("--fp8-format hybrid", "that no dispatcher pads experts' rows for FP8 kernels"),
)

PAGE = """# Parallel layouts

Made by `python -m tests.distributed.layouts > docs/parallelism.md` from the parameters of the tests.

Every row was run on 2 shared x86-64 cores without a GPU (torch 2.13.0, Megatron-Core 0.19.2, gloo ranks), five training
steps of a model of hidden size 32 with four experts in each of two or four layers. `make test` runs the rows marked
*; `make layouts` runs all.

Words: TPn tensor parallel n with sequence parallel, ETPn expert tensor parallel (default: as TP), PPn pipeline
parallel, VPPn stages a pipeline rank, EPn expert parallel, DO distributed optimizer. Ranks that are left over are data
parallel. Their flags:

| word | flags |
|---|---|
{words}

## Equal widths: Megatron's own MoE, bit by bit

Compared with Megatron's MoE layer and `SequentialMLP` under the same flags, experts' initial weights equal
(`--hmoe-gemm-backend reference`, no P-Penalty): the losses and gradient norms of five steps and every weight of every
rank after them are bitwise equal. In rows with +, whose ranks share an expert under the distributed optimizer, the norm
is within {ulps:.1e} of Megatron's, and losses and weights are compared without clipping: the experts of a layer are two
tensors here and two an expert there, so a rank's share of them ends elsewhere and its squares are of other elements.

| ranks | layout | in `make test` |
|---|---|---|
{stock}

## Unequal widths, cut experts: one rank

Widths 16, 32, 48 and 64 with P-Penalty; with EP > 1 experts are cut by width over the ranks, also in every row with
recomputation and overlap. Compared with the same model on one rank, experts whole:
- fp32: losses within {loss:.0e}, gradient norms within {norm:.0e}, relative; experts' weights after five steps within
  {weight:.0e}; the same number of tokens for every expert;
- bf16, where rounding moves tokens to other experts: losses within {bf16_loss:.0e}, norms within {bf16_norm:.0e}.

| ranks | layout | compared | in `make test` |
|---|---|---|---|
{one}

## What needs a GPU

Refused without one, by these words:

{refused}

With a GPU they need only their flags (FP8 and context parallelism with `--transformer-impl transformer_engine`, flex
with `--bf16`). Under FP8, Transformer Engine computes attention, dense layers and shared experts in FP8; routed experts
stay in the model's own precision, and `--fp8-param-gather` is refused. No GPU was at hand. What was run without one:

| flag | run on a CPU |
|---|---|
{standins}

The training runs that `make gpu` does (`make test PYTEST_ARGS="-m gpu"` has the same as tests; their flags are checked
without a GPU, their bounds are guesses; TE: `{te}`, local: `{local}`):

| run | GPUs | compared with |
|---|---|---|
{gpu}
"""


def parallelism_document() -> str:
    """docs/parallelism.md."""
    return PAGE.format(
        words="\n".join(f"| {word} | `{flags}` |" for word, flags in (WORDS | MODEL_WORDS).items()),
        stock=_lines(AGAINST_STOCK, lambda row: " +" if row.cuts_elsewhere else ""),
        ulps=ONE_ULP,
        one=_lines(AGAINST_ONE_RANK, lambda row: f" | {'bf16' if row.bf16 else 'fp32'} bounds"),
        loss=LOSS_BOUND,
        norm=NORM_BOUND,
        weight=WEIGHT_BOUND,
        bf16_loss=BF16_LOSS_BOUND,
        bf16_norm=BF16_NORM_BOUND,
        te=TE,
        local=LOCAL,
        refused="\n".join(f"- {refusal(flag)}" for flag, _ in NEEDS_GPU),
        standins="\n".join(f"| `{flag}` | {what} |" for flag, what in NEEDS_GPU),
        gpu="\n".join(f"| {run.name} | {run.gpus} | {gpu_comparison(run)} |" for run in RUNS),
    )


def _lines(layouts, comparison):
    return "\n".join(f"| {row.ranks} | {row.words}{comparison(row)} | {'*' if row.suite else ''} |" for row in layouts)


def refusal(flag: str) -> str:
    """What a machine without a GPU says of a flag."""
    try:
        cpu_argv(flag.split())
    except ValueError as error:
        return str(error)
    raise AssertionError(f"{flag} is not refused")


def gpu_comparison(run) -> str:
    if run.resume:
        return f"itself, not broken, losses within {run.bound:.0e}"
    if run.against is None:
        return "losses fall"
    against = run.against.replace(TE, "TE").replace(LOCAL, "local") or "no flag"
    return f"{against}, {run.against_gpus} GPU, losses within {run.bound:.0e}"


if __name__ == "__main__":
    print(parallelism_document(), end="")
