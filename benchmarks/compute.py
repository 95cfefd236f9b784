"""The experts' compute on a CPU beside Megatron's, in one run: make bench-compute, to benchmarks/compute.md.

Every comparison is between processes that each hold a model and are timed in turns (duel.py): medians over rounds, and
the ratios of the rounds. One core a rank; one rank is timed by the CPU time of its thread, several by the clock.
"""

import argparse
import contextlib
import dataclasses
import statistics
from pathlib import Path

from benchmarks.duel import Side, alternate, ratio
from benchmarks.machine import ROOT, stamp
from hmoe_megatron.files import atomic_write
from hmoe_megatron.placement.plan import PlacementPlan
from hmoe_megatron.placement.planner import contiguous_plan
from hmoe_megatron.widths import layer_widths

OUTPUT = ROOT / "benchmarks" / "compute.md"
RUNS = ROOT / "runs" / "compute"
HIDDEN, MEAN_WIDTH, ROWS = 512, 256, 1024
MODEL = (
    f"--num-layers 2 --hidden-size {HIDDEN} --num-attention-heads 8 --seq-length 512 --max-position-embeddings 512 "
    "--position-embedding-type rope --swiglu --disable-bias-linear --normalization RMSNorm "
    "--untie-embeddings-and-output-weights --moe-router-topk 2 --hidden-dropout 0 --attention-dropout 0 "
    "--micro-batch-size 4 --global-batch-size 8 --lr 1e-4 --min-lr 1e-4 --lr-decay-style constant "
    "--train-iters 100000 --mock-data --tokenizer-type NullTokenizer --vocab-size 4096 --log-interval 1000 "
    "--eval-interval 1000000 --eval-iters 0 --moe-token-dispatcher-type alltoall "
    # Random routing, the same number of rows for every expert: both sides then compute as many FLOPs.
    "--moe-router-force-load-balancing --moe-router-load-balancing-type none"
)
SCALING_WIDTH, SCALING_ROWS, SCALING = 512, 128, (8, 16, 32, 64, 128, 256)
SLOTS_ROUNDS = 5  # times as many
# What, and at most how much of the other side's time.
GOALS = {"experts over dense": 1.08, "experts over stock": 1.03, "slots": 1.02, "step": 1.05, "a token": 1.2}


def ours(experts: int = 8, mean_width: int = MEAN_WIDTH, more: str = "") -> str:
    """Flags of widths 9..23 of this mean, a multiple of 8."""
    widths = f"--hmoe-widths arithmetic:9:23 --hmoe-total-width {experts * mean_width} --hmoe-width-multiple 8"
    return f"{MODEL} --num-experts {experts} {widths} {more}"


def stock(experts: int = 8, mean_width: int = MEAN_WIDTH, more: str = "") -> str:
    """Flags of Megatron's MoE of as many parameters."""
    return f"{MODEL} --num-experts {experts} --moe-ffn-hidden-size {mean_width} {more}"


class Table:
    """Rows `| what | ours | other | ratio (least to most) | goal |`."""

    def __init__(self):
        self.rows = ["| what | ours, ms | beside it, ms | ratio, of rounds | goal |", "|---|---|---|---|---|"]

    def add(self, what: str, medians: dict, name: str, to: str, goal: float | None = None) -> None:
        middle, least, most = ratio(medians, name, to)
        ms = [f"{statistics.median(medians[side]):.1f}" for side in (name, to)]
        met = "" if goal is None else f"at most {goal} {'met' if middle <= goal else 'MISSED'}"
        self.rows.append(f"| {what} | {ms[0]} | {ms[1]} | {middle:.3f} ({least:.3f} to {most:.3f}) | {met} |")
        print(self.rows[-1], flush=True)


def timed(side: Side, what: str, **how):
    """What ``alternate`` asks a side for."""
    return lambda: side.ask(what, **how)["ms"]


@contextlib.contextmanager
def sides(of: dict[str, tuple], ranks: int = 1):
    """{name: Side} of {name: (kind, flags)}, ready."""
    with contextlib.ExitStack() as stack:
        started = {
            name: stack.enter_context(Side(name, kind, flags, RUNS / f"{name}.log", ranks))
            for name, (kind, flags) in of.items()
        }
        for side in started.values():
            side.ready()
            side.ask("build")
        yield started


def experts_layer_and_step(table: Table, rounds: int) -> None:
    """One rank: experts, MoE layer and training step beside Megatron's, and slots beside none."""
    turned = turned_plan(RUNS / "turned.json")
    kinds = {
        "ours": ("ours", ours()),
        "stock": ("stock", stock()),
        "with slots": ("ours", ours(more=f"--hmoe-placement {turned}")),
    }
    with sides(kinds) as of:
        medians = alternate(
            {
                name: timed(side, what, count=2, rows=ROWS)
                for name, side, what in (
                    ("ours", of["ours"], "experts"),
                    ("stock", of["stock"], "experts"),
                    ("dense", of["stock"], "dense"),
                )
            },
            rounds,
        )
        table.add(
            "experts, beside one dense FFN of the same FLOPs", medians, "ours", "dense", GOALS["experts over dense"]
        )
        table.add(
            "experts, beside SequentialMLP of equal widths", medians, "ours", "stock", GOALS["experts over stock"]
        )
        tokens = ROWS * 8 // 2
        # The difference that slots make is far below the noise of a round.
        medians = alternate(
            {name: timed(side, "moe_layer", count=2, tokens=tokens) for name, side in of.items()}, SLOTS_ROUNDS * rounds
        )
        table.add("MoE layer, beside Megatron's", medians, "ours", "stock")
        table.add(
            "MoE layer with experts in other slots, beside one without", medians, "with slots", "ours", GOALS["slots"]
        )
        medians = alternate({name: timed(of[name], "step", count=2) for name in ("ours", "stock")}, rounds)
        table.add("training step, beside Megatron's MoE", medians, "ours", "stock", GOALS["step"])


def turned_plan(path: Path) -> Path:
    """A plan of one rank that holds the experts in the other order, so that the router's columns must be moved."""
    plan = contiguous_plan(layer_widths("arithmetic:9:23", 2, 8, 8 * MEAN_WIDTH, 8), 1)
    layers = [dataclasses.replace(layer, pieces=(layer.pieces[0][::-1],)) for layer in plan.layers]
    PlacementPlan(tuple(layers)).save(path)
    return path


def step_on_two_ranks(table: Table, rounds: int) -> None:
    """The same step with expert parallelism over two ranks of one core each."""
    more = "--expert-model-parallel-size 2"
    with sides({"ours, EP 2": ("ours", ours(more=more)), "stock, EP 2": ("stock", stock(more=more))}, 2) as of:
        medians = alternate({name: timed(side, "step", count=2) for name, side in of.items()}, rounds)
    table.add("training step, two ranks, expert parallel", medians, "ours, EP 2", "stock, EP 2", GOALS["step"])


def scaling(rounds: int) -> list[str]:
    """Cost of a token in an MoE layer by the number of experts, each with as many rows: ours and Megatron's."""
    lines = [
        "| experts | tokens | us a token, ours | of 8 experts | us a token, Megatron's | ours over Megatron's |",
        "|---|---|---|---|---|---|",
    ]
    kinds = {
        f"{kind}_{experts}": (kind, flags(experts, SCALING_WIDTH, "--num-layers 1"))
        for experts in SCALING
        for kind, flags in (("ours", ours), ("stock", stock))
    }
    tokens = {experts: SCALING_ROWS * experts // 2 for experts in SCALING}
    with sides(kinds) as of:  # all at once, so that the sizes are compared within the same rounds
        medians = alternate(
            {
                name: timed(
                    side,
                    "moe_layer",
                    count=max(2, 4096 // tokens[int(name.split("_")[1])]),
                    tokens=tokens[int(name.split("_")[1])],
                )
                for name, side in of.items()
            },
            rounds,
        )
    for name, of_rounds in medians.items():
        medians[name] = [ms * 1e3 / tokens[int(name.split("_")[1])] for ms in of_rounds]
    most = 0.0
    for experts in SCALING:
        mine, theirs = f"ours_{experts}", f"stock_{experts}"
        to_first = ratio(medians, mine, f"ours_{SCALING[0]}")[0]
        most = max(most, to_first)
        lines.append(
            f"| {experts} | {tokens[experts]} | {statistics.median(medians[mine]):.1f} | {to_first:.3f} | "
            f"{statistics.median(medians[theirs]):.1f} | {ratio(medians, mine, theirs)[0]:.3f} |"
        )
        print(lines[-1], flush=True)
    met = "met" if most <= GOALS["a token"] else "MISSED"
    return [*lines, "", f"Goal: flat within 20 %; the most is {most:.3f} of 8 experts' cost: {met}."]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=11, help="of each comparison; default: 11")
    given = parser.parse_args(argv)
    if given.rounds < 1:
        parser.error(f"--rounds {given.rounds}: give at least 1")
    RUNS.mkdir(parents=True, exist_ok=True)
    table = Table()
    experts_layer_and_step(table, given.rounds)
    step_on_two_ranks(table, given.rounds)
    text = f"""# The experts' compute on a CPU

`make bench-compute` on {stamp("torch", "megatron-core")}.

Hidden size {HIDDEN}, 8 experts of widths 9:11:...:23, mean {MEAN_WIDTH}, beside equal ones of {MEAN_WIDTH}; Top-2,
fp32, two layers; {ROWS} rows an expert alone, {ROWS * 4} tokens in the layer, 4,096 a step. Routing is random and even
on both sides (`--moe-router-force-load-balancing`), so FLOPs are equal. Processes timed in turns, medians of
{given.rounds} rounds, of the layer {SLOTS_ROUNDS * given.rounds}; in brackets the least and the most ratio of a round.

{chr(10).join(table.rows)}

## By the number of experts

An MoE layer, hidden size {HIDDEN}, mean width {SCALING_WIDTH}, {SCALING_ROWS} rows an expert. The router's own products
grow with the number of experts: 8 % of the layer's at 256.

{chr(10).join(scaling(given.rounds))}
"""
    print(text)
    atomic_write(OUTPUT, text.encode())


if __name__ == "__main__":
    main()
