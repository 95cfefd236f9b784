"""The planner's figures, beside those of contiguous placement and of EPLB's method: python -m benchmarks.planner

Prints them and writes benchmarks/planner.md.
"""

import argparse
import os
import resource
import statistics
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor

import numpy as np

from benchmarks.cases import under_caps, whole_layer
from benchmarks.load_traces import TRACES, snapshot
from benchmarks.machine import ROOT, stamp
from benchmarks.replan_simulation import (
    MAX_LOSS,
    PAUSE_STEPS,
    ROOM,
    STEPS,
    WINDOW,
    campaign,
    campaign_table,
    standard_cases,
)
from hmoe_megatron.files import atomic_write
from hmoe_megatron.placement import CostModel, nodes_of, plan_layer, plan_model
from hmoe_megatron.placement.baselines import CONTIGUOUS, EPLB_TOKENS, EPLB_WORK, baselines, equal_counts
from hmoe_megatron.placement.milp import fastest
from hmoe_megatron.placement.plan import PlacementPlan
from hmoe_megatron.placement.profiles import PROFILES
from hmoe_megatron.widths import expert_widths

OUTPUT = ROOT / "benchmarks" / "planner.md"
SIZES = [(8, 8), (8, 4), (64, 8), (64, 16), (128, 32), (256, 64), (512, 64)]
MEAN_WIDTH, HIDDEN_SIZE, TOKENS_A_RANK = 1536, 4096, 8192
FLOPS_UNIT, GPU_UNIT = 16, 128  # cut multiples
ORACLE_CASES, NODES = 500, 20_000
SCHEDULES = {
    "9..23": lambda E: "arithmetic:9:23",
    "hybrid": lambda E: "hybrid:" + ",".join(str((1, 1, 1, 1, 2, 2, 4, 4)[e % 8]) for e in range(E)),
}
LOADS = {
    "uniform": lambda E, R, F: np.ones(E),
    "lognormal 0.6": lambda E, R, F: np.random.default_rng(0).lognormal(0, 0.6, E),
    "Zipf 1": lambda E, R, F: 1 / np.arange(1, E + 1),
    "inverse to width": lambda E, R, F: 1 / F,
    **{name: lambda E, R, F, name=name: snapshot(name, E, R).astype(float) for name in TRACES},
}


def layer(schedule: str, load: str, experts: int, ranks: int, multiple: int):
    """(tokens_E, widths_E) of one micro-batch of all ranks; Top-2 of 8 experts, Top-8 of more."""
    widths = expert_widths(SCHEDULES[schedule](experts), experts, experts * MEAN_WIDTH, multiple)
    share = LOADS[load](experts, ranks, np.array(widths))
    return share / share.sum() * ranks * TOKENS_A_RANK * (2 if experts == 8 else 8), widths


def over_mean(plan: PlacementPlan) -> float:
    return plan.layers[0].predicted.over_mean


def flops_tables():
    """Balance with cuts that cost nothing: worst of all loads."""
    yield (
        "\n## FLOPs profile: slowest rank over the mean, the worst of 12 loads\n\nUniform, lognormal 0.6, Zipf 1, "
        f"inverse to width, W0 to W7; mean width {MEAN_WIDTH:,}, cuts at multiples of {FLOPS_UNIT}.\n"
    )
    yield (
        "| experts/ranks | widths | contiguous | EPLB, by tokens | EPLB, by tokens x width | planned | most cuts | "
        "allowed |\n|---|---|---|---|---|---|---|---|"
    )
    missed = []
    for experts, ranks in SIZES:
        for schedule in SCHEDULES:
            worst, cuts = Counter(), 0
            for load in LOADS:
                tokens, widths = layer(schedule, load, experts, ranks, FLOPS_UNIT)
                plan = plan_model([tokens], [widths], ranks, cut_multiple=FLOPS_UNIT)
                for name, other in {**baselines(plan), "planned": plan}.items():
                    worst[name] = max(worst[name], over_mean(other))
                cuts = max(cuts, plan.layers[0].cuts)
                if over_mean(plan) > 1.01:
                    unit = FLOPS_UNIT * max(tokens) * ranks / np.dot(tokens, widths)
                    missed.append(
                        f"{experts}/{ranks} {schedule} {load} {over_mean(plan):.4f}, where one cut unit of "
                        f"the hottest expert is {unit:.1%} of the mean"
                    )
            yield (
                f"| {experts}/{ranks} | {schedule} | "
                + " | ".join(f"{worst[name]:.3f}" for name in (CONTIGUOUS, EPLB_TOKENS, EPLB_WORK))
                + f" | {worst['planned']:.4f} | {cuts} | {ranks - 1} |"
            )
    yield f"\nOver 1.01: {'; '.join(missed) or 'none'}."


def gpu_tables():
    """Gap to the bound of every case under the h100 profile."""
    yield (
        f"""
## H100 profile: gap of the slowest rank to the bound, %

Published figures, nothing measured; hidden size {HIDDEN_SIZE:,}, mean width {MEAN_WIDTH:,}, cuts at multiples of
{GPU_UNIT}, {TOKENS_A_RANK:,} tokens a rank. The bound holds for any number of cuts. In the last columns what others
take longer than planned, the mean over loads.
"""
    )
    yield (
        "| experts/ranks | widths | nodes | " + " | ".join(LOADS) + " | contiguous | EPLB, tokens | EPLB, x width |"
        " whole |\n" + "|---" * (7 + len(LOADS)) + "|"
    )
    slower, over = 0, []
    cost = CostModel(PROFILES["h100"], HIDDEN_SIZE)
    for experts, ranks in SIZES:
        for schedule in SCHEDULES:
            for nodes in (1, 4):
                gaps, longer = [], []
                for load in LOADS:
                    tokens, widths = layer(schedule, load, experts, ranks, GPU_UNIT)
                    where = nodes_of(nodes, ranks // nodes)
                    plan = plan_model([tokens], [widths], where, cost, cut_multiple=GPU_UNIT)
                    whole = plan_model([tokens], [widths], where, cost, 0)
                    slower += plan.time > whole.time * (1 + 1e-12)
                    gaps.append(plan.layers[0].predicted.gap)
                    if experts >= 8 * ranks and gaps[-1] > 0.03:
                        over.append(f"{experts}/{ranks} {schedule} {nodes} nodes {load} {gaps[-1]:.2%}")
                    others = baselines(plan)
                    longer.append(
                        [
                            other.time / plan.time - 1
                            for other in (others[CONTIGUOUS], others[EPLB_TOKENS], others[EPLB_WORK], whole)
                        ]
                    )
                yield (
                    f"| {experts}/{ranks} | {schedule} | {nodes} | "
                    + " | ".join(f"{100 * g:.2f}" for g in gaps)
                    + " | "
                    + " | ".join(f"+{100 * x:.1f}" for x in np.mean(longer, axis=0))
                    + " |"
                )
    yield (
        f"\nSlower than the best whole-expert plan: {slower} cases. Eight experts a rank or more with a gap over 3 "
        f"%: {', '.join(over) or 'none'}."
    )


def oracle_case(seed: int) -> tuple[float, bool, bool]:
    """(planned over the exact optimum minus 1, optimum proven, slower than EPLB's method)."""
    case = whole_layer(seed)
    problem, planned = case.problem(), max(case.plan().predicted.time)
    found = fastest(problem, NODES)
    weights = (case.tokens_E, [m * F for m, F in zip(case.tokens_E, case.widths_E, strict=True)])
    eplb = []
    for weights_E in weights:
        owners = np.array(equal_counts(weights_E, problem.ranks))
        eplb.append(max(problem.times(problem.held(problem.whole, owners))))
    return planned / max(problem.times(found.held)) - 1, found.proven, planned > min(eplb) * (1 + 1e-9)


def oracle_lines(pool):
    over, proven, slower = zip(*pool.map(oracle_case, range(ORACLE_CASES), chunksize=10), strict=True)
    yield (
        f"\n## Whole experts against HiGHS\n\n{ORACLE_CASES} random layers of 2 to 16 experts on 2 to 8 ranks: at "
        f"most {max(over):.3%} above the exact optimum (proven for {sum(proven)}), "
        f"{sum(o <= 1e-6 for o in over)} of them at it; slower than EPLB's method in {sum(slower)}."
    )


def caps_lines(pool, cases: int):
    found = Counter(pool.map(under_caps, range(cases), chunksize=50))
    yield (
        f"\n## Memory caps\n\n{cases:,} random layers of 2 to 40 experts whose caps some placement keeps: kept "
        f"{found['kept']:,}, broken {found['broken']}; not found {found['not found']}, where for up to 16 experts "
        f"HiGHS has none either with more nodes; of these given up though HiGHS has one: {found['missed']}."
    )


def speed_lines():
    times = []
    for seed in range(200):
        widths = expert_widths("arithmetic:9:23", 256, 256 * MEAN_WIDTH)
        tokens = np.random.default_rng(seed).lognormal(0, 0.6, 256)
        start = time.perf_counter()
        plan_layer(tokens, widths, 64, cut_multiple=FLOPS_UNIT)
        times.append(1e3 * (time.perf_counter() - start))
    seconds, mib = map(
        float,
        subprocess.run(
            [sys.executable, "-m", "benchmarks.planner", "--large"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        ).stdout.split(),
    )
    yield (
        f"\n## Time to plan, on one core\n\nA layer of 256 experts on 64 ranks, lognormal 0.6: median "
        f"{statistics.median(times[5:]):.2f} ms, 90 % within {np.quantile(times[5:], 0.9):.2f} ms.\n\n60 layers of "
        f"1,024 experts on 1,024 ranks in 128 nodes: {seconds:.1f} s, {mib:,.0f} MiB at the most."
    )


def plan_large() -> str:
    """Seconds and MiB of a large plan, measured in a process of its own."""
    rng = np.random.default_rng(0)
    widths = expert_widths("arithmetic:9:23", 1024, 1024 * MEAN_WIDTH, GPU_UNIT)
    tokens_LE = rng.lognormal(0, 0.6, (60, 1024)) * TOKENS_A_RANK * 8
    start = time.perf_counter()
    plan_model(
        tokens_LE, [widths] * 60, nodes_of(128, 8), CostModel(PROFILES["h100"], HIDDEN_SIZE), cut_multiple=GPU_UNIT
    )
    seconds = time.perf_counter() - start
    return f"{seconds} {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}"


def policy_lines():
    yield f"""
## Experts that move while training

`python -m benchmarks.replan_simulation` on {stamp("numpy", "scipy")}.

8 H100 by published figures, one layer of 16 or 64 experts, h100 and FLOPs profiles, {STEPS:,} steps, one seed; plans
for windows of {WINDOW} steps, --hmoe-replan-room {ROOM:g}, --hmoe-replan-max-loss {MAX_LOSS:g}. A change takes
{PAUSE_STEPS} steps and the busiest rank's bytes between nodes, times 0.5 to 2 at random. It is included, planning is
not. A gain below zero is a loss against staying.
"""
    yield campaign_table(campaign(standard_cases()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=2000, help="random layers under caps; default: 2000")
    parser.add_argument("--large", action="store_true", help="print seconds and MiB of a large plan only")
    given = parser.parse_args()
    if given.large:
        print(plan_large())
        return
    lines = [
        "# The planner's figures",
        "",
        f"`make bench-planner CASES={given.cases}` on {stamp('numpy', 'scipy')}.",
        "Predicted by the cost model; nothing here ran on a GPU.",
        "",
    ]

    def say(parts):
        for part in parts:
            print(part, flush=True)
            lines.append(part)

    print("\n".join(lines))
    say(speed_lines())
    say(flops_tables())
    say(gpu_tables())
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        say(oracle_lines(pool))
        say(caps_lines(pool, given.cases))
    say(policy_lines())
    atomic_write(OUTPUT, ("\n".join(lines).rstrip() + "\n").encode())


if __name__ == "__main__":
    os.environ["OMP_NUM_THREADS"] = "1"
    main()
