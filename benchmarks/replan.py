"""Experts that move while training beside those that stay: make bench-replan, to benchmarks/replan.md.

Two runs of the demo's model, each on two ranks of one core, train a few steps in turns on the same data: "still" never
moves an expert, "moving" decides by itself (--hmoe-replan-interval). Router and loads are the model's own, or follow a
workload of load_traces.py.
"""

import argparse
import contextlib
import math
import os
import shutil
import statistics
import time
from dataclasses import dataclass, field

import numpy as np

from benchmarks.duel import Side
from benchmarks.load_traces import TRACES
from benchmarks.machine import ROOT, stamp
from benchmarks.replan_rank import SENDS
from examples.demo import EXAMPLE
from hmoe_megatron.files import atomic_write
from hmoe_megatron.flag_files import read_args

OUTPUT = ROOT / "benchmarks" / "replan.md"
RUNS = ROOT / "runs" / "replan"
COMMON = EXAMPLE.parents[1] / "common"
FORCED = ("W1", "W3", "W6")
INTERVAL, TURN = 15, 5  # steps from look to look, and of one side's turn
STILL, MOVING = "still", "moving"
GOAL_SENDING, GOAL_AFTER, GOAL_RUN, GOAL_SHARE = 1.5, 1.02, 1.03, 0.7

# Columns of the tables.
SUMMARY = (
    "loads, changes, ms a step still, moving, gained, perfect, share, over mean still, moving, whole run moving, "
    "s of looks and changes, all time over still"
)
VERDICTS = "goal, , worst, "
CHANGES = (
    "loads, before step, MB, ms, alone, over alone, in steps, of a restart, over mean before, after, ms gained a step, "
    "break-even steps, of a restart"
)
TIME = (
    "loads, steps, ms a step still, over mean, by rows, ms a step moving, over mean, by rows, moving over still, "
    "moved, ms of the look"
)


def flags(router: str) -> str:
    """Of the demo's model without its files: the ranks make batches of bytes."""
    files = (EXAMPLE.with_name("model.args"), COMMON / "arithmetic.args", COMMON / f"{router}.args")
    more = "--tokenizer-type NullTokenizer --vocab-size 4096 --mock-data --hmoe-console megatron"
    return " ".join([*(word for file in files for word in read_args(file)), more])


@dataclass
class Run:
    """Of every step N: seconds without the look before it, seconds of the look, milliseconds in the experts of each
    rank R and layer L, and by rows and widths the slowest rank over the mean. changes: (step, what is said of it)."""

    step_s: list[float] = field(default_factory=list)
    look_s: list[float] = field(default_factory=list)
    expert_ms_NRL: list = field(default_factory=list)
    by_rows: list[float] = field(default_factory=list)
    changes: list[tuple[int, dict]] = field(default_factory=list)

    def add(self, told: dict) -> None:
        self.changes += [(len(self.step_s), change) for change in told["changes"]]
        for step in told["steps"]:
            self.step_s.append(step["ms"] / 1e3)
            self.look_s.append(step["look_ms"] / 1e3)
            self.expert_ms_NRL.append(step["expert_ms"])
            self.by_rows.append(step["by_rows"])

    def over_mean(self, first: int = 0, last: int | None = None) -> float:
        """Measured, layer by layer: busiest rank's experts over the mean, from each rank's and layer's median step."""
        time_RL = np.median(np.array(self.expert_ms_NRL[first:last]), axis=0)
        return float(time_RL.max(axis=0).sum() / time_RL.mean(axis=0).sum())

    def perfect_s(self, first: int) -> list[float]:
        """What perfect balance would take off each step: the mean experts' time, times what is over the mean."""
        mean_N = np.array(self.expert_ms_NRL[first:]).mean(axis=1).sum(axis=1) / 1e3
        return (mean_N * (np.array(self.by_rows[first:]) - 1)).tolist()


def train(workload: str, steps: int, warm_up: int, restart: bool) -> tuple[dict[str, Run], dict | None]:
    """Both sides in turns; with ``restart`` also what a checkpoint and a start from it with the new plan take."""
    base = flags("topp" if workload == "own" else "topk")
    sides_of = {STILL: base, MOVING: f"{base} --hmoe-replan-interval {INTERVAL}"}
    runs, restarted = {STILL: Run(), MOVING: Run()}, None
    with contextlib.ExitStack() as stack:
        sides = {
            name: stack.enter_context(
                Side(name, "ours", words, RUNS / f"{workload}_{name}.log", 2, "benchmarks.replan_rank")
            )
            for name, words in sides_of.items()
        }
        for name, side in sides.items():
            side.ready()
            side.ask("build")
            side.ask("begin", workload=workload, replan=name == MOVING, warm_up=warm_up)
        for turn in range(steps // TURN):
            for name in list(sides)[:: 1 if turn % 2 == 0 else -1]:
                runs[name].add(sides[name].ask("train", count=TURN))
        if restart:
            restarted = restart_of(sides[MOVING], base, workload)
    return runs, restarted


def restart_of(side: Side, base: str, workload: str) -> dict:
    """Seconds of the save, and of a fresh start from it under the plan beside it to the end of its first step."""
    folder = RUNS / "checkpoint"
    shutil.rmtree(folder, ignore_errors=True)
    saved = side.ask("save", directory=str(folder))
    begun_s = time.perf_counter()
    words = f"{base} --load {folder} --hmoe-placement {folder / 'new_plan.json'}"
    with Side("restart", "ours", words, RUNS / f"{workload}_restart.log", 2, "benchmarks.replan_rank") as fresh:
        fresh.ready()
        fresh.ask("build")
        fresh.ask("begin", workload=workload, replan=False)
        fresh.ask("train", count=1)
        start_s = time.perf_counter() - begun_s
    shutil.rmtree(folder)
    return {"save_s": saved["s"], "start_s": start_s}


def over_time(workload: str, runs: dict[str, Run]) -> list[str]:
    """A row for the steps from look to look."""
    still, moving = runs[STILL], runs[MOVING]
    rows = []
    for first in range(0, len(still.step_s), INTERVAL):
        last = first + INTERVAL
        moved = [f"{sum(c['bytes']) / 1e6:.1f} MB" for step, c in moving.changes if step == first]
        cells = [
            f"{statistics.median(run.step_s[first:last]) * 1e3:.0f} | {run.over_mean(first, last):.3f} | "
            f"{statistics.mean(run.by_rows[first:last]):.3f}"
            for run in (still, moving)
        ]
        ratio = statistics.median(map(lambda a, b: b / a, still.step_s[first:last], moving.step_s[first:last]))
        rows.append(
            f"| {workload} | {first + 1} to {min(last, len(still.step_s))} | {' | '.join(cells)} | {ratio:.3f} | "
            f"{', '.join(moved)} | {moving.look_s[first] * 1e3:.0f} |"
        )
    return rows


def change_rows(workload: str, runs: dict[str, Run], restart_s: float) -> list[str]:
    """A row for each change."""
    still, moving = runs[STILL], runs[MOVING]
    rows = []
    for number, (step, change) in enumerate(moving.changes):
        last = moving.changes[number + 1][0] if number + 1 < len(moving.changes) else None
        before = moving.over_mean(moving.changes[number - 1][0] if number else 0, step)
        gain_s = statistics.median(map(lambda a, b: a - b, still.step_s[step:last], moving.step_s[step:last]))
        pays = [str(math.ceil(s / gain_s)) if gain_s > 0 else "never" for s in (change["s"], restart_s)]
        rows.append(
            f"| {workload} | {step} | {sum(change['bytes']) / 1e6:.1f} | {change['s'] * 1e3:.0f} | "
            f"{change['sending_s'] * 1e3:.1f} | {change['s'] / change['sending_s']:.1f} | "
            f"{change['s'] / statistics.median(moving.step_s):.2f} | {change['s'] / restart_s:.3f} | {before:.3f} | "
            f"{moving.over_mean(step, last):.3f} | {gain_s * 1e3:.0f} | {' | '.join(pays)} |"
        )
    return rows


def summary(workload: str, runs: dict[str, Run]) -> tuple[str, float]:
    """The workload's row, and the share of perfect balance's gain."""
    still, moving = runs[STILL], runs[MOVING]
    first = moving.changes[0][0] if moving.changes else INTERVAL
    gain_s = statistics.median(map(lambda a, b: a - b, still.step_s[first:], moving.step_s[first:]))
    possible_s = statistics.median(still.perfect_s(first))
    spent_s = sum(moving.look_s)
    total_s = [sum(run.step_s) for run in (still, moving)]
    row = (
        f"| {workload} | {len(moving.changes)} | {statistics.median(still.step_s[first:]) * 1e3:.0f} | "
        f"{statistics.median(moving.step_s[first:]) * 1e3:.0f} | {gain_s * 1e3:.0f} | {possible_s * 1e3:.0f} | "
        f"{gain_s / possible_s:.2f} | {still.over_mean(first):.3f} | {moving.over_mean(first):.3f} | "
        f"{moving.over_mean():.3f} | {spent_s:.1f} | {(total_s[1] + spent_s) / total_s[0]:.3f} |"
    )
    return row, gain_s / possible_s


def verdicts(of: dict[str, dict[str, Run]], shares: dict[str, float]) -> list[str]:
    """Each goal with its worst figure."""
    changes = [(runs[MOVING], step, change) for runs in of.values() for step, change in runs[MOVING].changes]
    ends = [(run, step, next((later for later, _ in run.changes if later > step), None)) for run, step, _ in changes]
    goals = [
        ("a change over sending its bytes alone", [c["s"] / c["sending_s"] for _, _, c in changes], GOAL_SENDING),
        ("a change in steps", [c["s"] / statistics.median(run.step_s) for run, _, c in changes], 1.0),
        ("busiest rank over mean after a change", [run.over_mean(*span) for run, *span in ends], GOAL_AFTER),
        ("busiest rank over mean, mean over a run", [runs[MOVING].over_mean() for runs in of.values()], GOAL_RUN),
    ]
    lines = [
        f"| {what} | at most {goal} | {max(values):.3f} | {'met' if max(values) <= goal else 'MISSED'} |"
        for what, values, goal in goals
        if values
    ]
    if (share := shares.get("own")) is not None:
        met = "met" if share >= GOAL_SHARE else "MISSED"
        lines.append(f"| own drift: share of perfect balance's gain | at least {GOAL_SHARE} | {share:.3f} | {met} |")
    return lines


def table(columns: str, rows) -> str:
    names = columns.split(", ")
    return "\n".join([f"| {' | '.join(names)} |", "|---" * len(names) + "|", *rows])


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60, help="of each run; default: 60")
    parser.add_argument("--workloads", default=",".join(("own", *FORCED)), help="default: own,W1,W3,W6")
    parser.add_argument(
        "--warm-up", type=int, default=60, help="steps of the model's own router before they are counted; default: 60"
    )
    given = parser.parse_args(argv)
    workloads = given.workloads.split(",")
    if unknown := [name for name in workloads if name not in ("own", *TRACES)]:
        parser.error(f"--workloads {','.join(unknown)}: give own or {', '.join(TRACES)}")
    if given.warm_up % INTERVAL:
        parser.error(f"--warm-up {given.warm_up}: give a multiple of {INTERVAL}")
    if given.steps % INTERVAL or given.steps <= INTERVAL:
        parser.error(f"--steps {given.steps}: give a multiple of {INTERVAL}, at least {2 * INTERVAL}")
    RUNS.mkdir(parents=True, exist_ok=True)
    load, of, restart = os.getloadavg()[0], {}, None
    for number, workload in enumerate(workloads):
        of[workload], restarted = train(workload, given.steps, given.warm_up if workload == "own" else 0, number == 0)
        restart = restart or restarted
        text = page(of, restart, given, load)
        atomic_write(OUTPUT, text.encode())
        print(*over_time(workload, of[workload]), sep="\n", flush=True)
    print(text)


def page(of: dict[str, dict[str, Run]], restart: dict, given, load: float) -> str:
    rows, shares = {}, {}
    for workload, runs in of.items():
        rows[workload], shares[workload] = summary(workload, runs)
    save_s, start_s = restart["save_s"], restart["start_s"]
    restart_s = save_s + start_s
    changes = [row for workload, runs in of.items() for row in change_rows(workload, runs, restart_s)]
    times = [row for workload, runs in of.items() for row in over_time(workload, runs)]
    command = f"--steps {given.steps} --warm-up {given.warm_up} --workloads {given.workloads}"
    return f"""# Experts that move while training, beside those that stay

`make bench-replan` (`{command}`) on {stamp("torch", "megatron-core")}.

The model of `make demo` (4 layers, 8 experts, hidden size 256), fp32, gloo, two ranks of one core each, 2,048 tokens a
step: bytes of docs/*.md. "still" never moves an expert; "moving" looks every {INTERVAL} steps, with the default
room and most loss. They train in turns of {TURN} steps, {given.steps} each. "own": the Top-P router and its own drift,
after {given.warm_up} steps of training. W1, W3 and W6 (load_traces.py): Top-2, and a bias makes the router choose just
the rows of the trace. Processes that wanted a core: {load:.1f} before, {os.getloadavg()[0]:.1f} after.

"over mean": experts' time of the busiest rank over the mean, layer by layer, of median steps; "by rows": the same by
rows and widths, mean over steps, so with what loads change from step to step. "perfect": what a step with no rank over
the mean would gain. Step times and gains are medians of steps without looks, after the first change.

{table(SUMMARY, rows.values())}

{table(VERDICTS, verdicts(of, shares))}

## Each change

"alone": one all_to_all_single of as many bytes between the same processes, median of {SENDS}. A restart instead took
{restart_s:.1f} s here: {save_s:.1f} s for the checkpoint, {start_s:.1f} s for new processes, model, load and the first
step. Break-even: steps until the gain has paid for a change, or for a restart.

{table(CHANGES, changes)}

## Over time

"look": all that was done before the first of these steps: loads, planning on rank 0, and a change where there is one.

{table(TIME, times)}
"""


if __name__ == "__main__":
    main()
