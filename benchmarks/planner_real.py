"""Is it real? The tiny model on two ranks of one core each, contiguous and planned placement in turn.

python -m benchmarks.planner_real. Measures a hardware profile, trains once to have loads, plans for them, then trains
with either plan in turn, and prints step time, expert time and its max over mean by rank beside what the cost model
predicts for the rows that were routed. Writes benchmarks/planner_real.md; runs and logs stay under runs/planner_real/.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.machine import ROOT, stamp
from examples.demo import DATA, DEMO, EXAMPLE, prepare_data, tool
from hmoe_megatron.files import PLAN_FILE, TELEMETRY_FILE, atomic_write
from hmoe_megatron.flag_files import read_args
from hmoe_megatron.placement.cost import CostModel, predict
from hmoe_megatron.placement.plan import PlacementPlan
from hmoe_megatron.placement.profiles import Profile
from hmoe_megatron.telemetry.reader import read_records
from hmoe_megatron.tools.plan_tool.model import Model, model_of

OUTPUT = ROOT / "benchmarks" / "planner_real.md"
RUNS = ROOT / "runs" / "planner_real"
STEP_MS = re.compile(r"elapsed time per iteration \(ms\): ([0-9.]+)")
WARM_UP = 10  # steps that are not counted
CONTIGUOUS, PLANNED = "contiguous", "planned"


@dataclass(frozen=True)
class Run:
    """Of the counted steps N of one training run: step_ms_N; expert_ms_NR: forward and backward, measured by rank;
    predicted_ms_NR: for the rows routed in each step, under the run's plan."""

    step_ms_N: np.ndarray
    expert_ms_NR: np.ndarray
    predicted_ms_NR: np.ndarray


def train(name: str, placement: str, steps: int) -> Path:
    """Train in a fresh directory, whose path is returned. SystemExit with the log's end if it fails."""
    directory = RUNS / name
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        2,
        ROOT / "benchmarks" / "pinned.py",
        *read_args(EXAMPLE),
        "--train-data-path",
        DATA / "train_text_document",
        "--valid-data-path",
        DATA / "valid_text_document",
        "--tokenizer-model",
        DEMO / "tokenizer.model",
        "--hmoe-run-dir",
        directory,
        "--hmoe-placement",
        placement,
        "--train-iters",
        steps,
        "--lr-decay-iters",
        240,
        "--log-interval",
        1,
        "--eval-iters",
        0,
        "--hmoe-console",
        "megatron",
    ]
    log = directory / "train.log"
    with log.open("w") as file:
        done = subprocess.run(
            list(map(str, command)), cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL
        )
    if done.returncode:
        sys.exit("".join(log.read_text().splitlines(keepends=True)[-20:]) + f"planner_real: {name} failed, see {log}")
    return directory


def read(directory: Path, model: Model, cost: CostModel) -> Run:
    plan = PlacementPlan.load(directory / PLAN_FILE, model.widths_LE, model.ranks)
    records = [record for _, record in read_records(directory / TELEMETRY_FILE, [])][WARM_UP:]
    step_ms = [float(ms) for ms in STEP_MS.findall((directory / "train.log").read_text())][WARM_UP:]
    return Run(
        np.array(step_ms),
        np.array([record["expert_time_ms"] for record in records]),
        np.array([predicted_ms(plan, record, model, cost) for record in records]),
    )


def predicted_ms(plan: PlacementPlan, record: dict, model: Model, cost: CostModel) -> list[float]:
    """[R] of one micro-batch of a rank, which is all that a step has here."""
    time_LR = []
    for layer_plan, layer in zip(plan.layers, record["layers"], strict=True):
        tokens_E = model.tokens * layer["experts_per_token"] * np.array(layer["token_share"])
        time_LR.append(predict(layer_plan.pieces, tokens_E, cost, plan.rank_specs, bound=0.0).time)
    return (1e3 * np.sum(time_LR, axis=0)).tolist()


def report(runs: dict[str, list[Run]], plan: PlacementPlan) -> list[str]:
    """The table, a row for each placement, and what planning gained."""
    lines = [
        "| placement | step ms | expert ms by rank | max/mean | predicted expert ms by rank | max/mean |",
        "|---|---|---|---|---|---|",
    ]
    slowest = {}
    for name, of in runs.items():
        measured_R, predicted_R = (
            np.median(np.concatenate(arrays), axis=0)
            for arrays in ([run.expert_ms_NR for run in of], [run.predicted_ms_NR for run in of])
        )
        step_ms = np.median(np.concatenate([run.step_ms_N for run in of]))
        slowest[name] = step_ms, measured_R.max(), predicted_R.max()
        columns = [f"{_numbers(of_R)} | {of_R.max() / of_R.mean():.3f}" for of_R in (measured_R, predicted_R)]
        lines.append(f"| {name} | {step_ms:.0f} | {' | '.join(columns)} |")
    by_run = [np.median(b.step_ms_N) / np.median(a.step_ms_N) for a, b in zip(*runs.values(), strict=True)]
    (step, measured, predicted), (step_p, measured_p, predicted_p) = slowest.values()
    off = [np.abs(run.predicted_ms_NR / run.expert_ms_NR - 1) for of in runs.values() for run in of]
    lines += [
        "",
        f"Planned over contiguous: step time {step_p / step:.3f} (of pairs of runs {_numbers(by_run, 3)}), "
        f"slowest rank's expert time {measured_p / measured:.3f} measured, {predicted_p / predicted:.3f} "
        "predicted.",
        f"Predicted expert time of a step and rank against measured: median error "
        f"{np.median(np.concatenate(off)):.1%}. Cuts in the plan: {sum(layer.cuts for layer in plan.layers)}.",
    ]
    return lines


def _numbers(values, digits: int = 1) -> str:
    return ", ".join(f"{value:.{digits}f}" for value in values)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40, help=f"of a run, the first {WARM_UP} not counted; default: 40")
    parser.add_argument("--rounds", type=int, default=4, help="runs with each placement; default: 4")
    given = parser.parse_args()
    if given.steps <= WARM_UP or given.rounds < 1:
        parser.error(f"give more than {WARM_UP} steps and at least 1 round")
    if len(os.sched_getaffinity(0)) < 2:
        parser.error("needs two cores: each rank has one of its own")
    if not (DATA / "valid_text_document.idx").exists():
        prepare_data()
    RUNS.mkdir(parents=True, exist_ok=True)
    profile_file, plan_file = RUNS / "profile.json", RUNS / "plan.json"
    model = model_of(read_args(EXAMPLE), [])
    _call(tool("profile_hardware.py", "--output", profile_file, "--hidden-size", model.hidden_size))
    warm = train("loads", CONTIGUOUS, given.steps)
    _call(
        tool(
            "plan_placement.py",
            "--args",
            EXAMPLE,
            "--loads",
            warm / TELEMETRY_FILE,
            "--profile",
            profile_file,
            "--output",
            plan_file,
            "--last",
            given.steps - WARM_UP,
        )
    )
    cost = CostModel(Profile.load(profile_file), model.hidden_size)
    runs = {CONTIGUOUS: [], PLANNED: []}
    for number in range(given.rounds):
        for name in list(runs)[:: 1 if number % 2 == 0 else -1]:  # a machine that slows down favours neither
            placement = CONTIGUOUS if name == CONTIGUOUS else str(plan_file)
            runs[name].append(read(train(f"{name}_{number}", placement, given.steps), model, cost))
            print(f"{name} {number}: median step {np.median(runs[name][-1].step_ms_N):.0f} ms", flush=True)
    plan = PlacementPlan.load(plan_file, model.widths_LE, model.ranks)
    text = f"""# Planned against contiguous placement, measured

`make bench-planner-real` on {stamp("torch", "megatron-core")}.

The tiny model of `make demo` (widths {model.widths_LE[0]!s} in {len(model.layers)} layers) on two gloo ranks of one
core each, {given.rounds} runs with each placement in turn, {given.steps - WARM_UP} counted steps a run; medians over
steps.

""" + "\n".join([*report(runs, plan), ""])
    print(text)
    atomic_write(OUTPUT, text.encode())


def _call(command: list[str]) -> None:
    subprocess.run(command, cwd=ROOT, check=True)


if __name__ == "__main__":
    main()
