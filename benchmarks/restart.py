"""From a killed rank to the next training step, under tools/launch.py: two gloo ranks of a tiny model on one machine.

python -m benchmarks.restart. Kills a rank with SIGKILL, in turn rank 0 and 1, some steps after a restart; the launcher
starts the run again from its last checkpoint. Writes benchmarks/restart.md.
"""

import argparse
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil

from benchmarks.machine import ROOT, stamp
from hmoe_megatron.files import atomic_write

OUTPUT = ROOT / "benchmarks" / "restart.md"
MODEL = (
    "--num-layers 2 --hidden-size 32 --num-attention-heads 4 --seq-length 16 --max-position-embeddings 16 "
    "--position-embedding-type rope --swiglu --disable-bias-linear --normalization RMSNorm "
    "--untie-embeddings-and-output-weights --num-experts 4 --moe-router-topk 2 --hmoe-widths 16,32,48,64 "
    "--hidden-dropout 0 --attention-dropout 0 --expert-model-parallel-size 2 --micro-batch-size 2 "
    "--global-batch-size 4 --lr 1e-3 --lr-decay-style constant --train-iters 100000 --save-interval 5 --log-interval 1 "
    "--eval-interval 100000 --eval-iters 0 --mock-data --tokenizer-type NullTokenizer --vocab-size 128 --seed 1 "
    "--hmoe-console megatron"
).split()
STEP = re.compile(r" iteration +(\d+)/ ")
RESTART = re.compile(r"launch: rank (\d) on \S+ .* restart \d+ of \d+ from step (\d+) in ([0-9.]+) s")
STEPS_BETWEEN = 12  # at least, so that a checkpoint lies between two kills
WAIT_S = 600


def follow(log: Path, launcher: subprocess.Popen) -> Iterator[tuple[float, str]]:
    """(seconds of time.monotonic, line) as a growing log gets them. SystemExit if the run ends or hangs."""
    with log.open() as file:
        last_s, part = time.monotonic(), ""
        while True:
            part += file.readline()
            if part.endswith("\n"):
                last_s = time.monotonic()
                yield last_s, part
                part = ""
            elif launcher.poll() is not None or time.monotonic() - last_s > WAIT_S:
                sys.exit(f"restart: the run does not go on, or ended ({launcher.poll()}):\n{log.read_text()[-3000:]}")
            else:
                time.sleep(0.005)


def rank_pid(launcher: subprocess.Popen, rank: int) -> int:
    children = psutil.Process(launcher.pid).children()
    return next(child.pid for child in children if child.environ()["RANK"] == str(rank))


def measure(kills: int, directory: Path) -> list[tuple[float, float, int]]:
    """(seconds from the kill to the launcher's line, to the end of the next step, steps lost) of every kill."""
    log, found = directory / "log", []
    command = [
        sys.executable,
        ROOT / "tools" / "launch.py",
        "--nproc-per-node",
        2,
        "pretrain_hmoe.py",
        *MODEL,
        "--save",
        directory / "run",
        "--load",
        directory / "run",
    ]
    with log.open("w") as file:
        launcher = subprocess.Popen(list(map(str, command)), cwd=ROOT, stdout=file, stderr=subprocess.STDOUT)
    try:
        lines = follow(log, launcher)
        for number in range(kills):
            for _ in range(STEPS_BETWEEN):
                step = next(int(match[1]) for _, line in lines if (match := STEP.search(line)))
            time.sleep(random.random() * 0.2)  # anywhere in a step or a save
            killed_s = time.monotonic()
            os.kill(rank_pid(launcher, number % 2), signal.SIGKILL)
            told_s = saved = None
            for seen_s, line in lines:
                if match := STEP.search(line):
                    if told_s:
                        break
                    step = int(match[1])
                elif match := RESTART.search(line):
                    told_s, saved = told_s or seen_s, int(match[2])
            found.append((told_s - killed_s, seen_s - killed_s, step - saved))
            print(
                f"kill {number + 1}: told after {found[-1][0]:.2f} s, next step after {found[-1][1]:.2f} s, "
                f"{found[-1][2]} steps done again",
                flush=True,
            )
    finally:
        launcher.terminate()
        launcher.wait()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=12, help="default: 12")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="restart-") as directory:
        load_before, found = os.getloadavg()[0], measure(given.kills, Path(directory))
    told_s, step_s, lost = (np.array(values) for values in zip(*found, strict=True))
    row = "| {} | {:.1f} | {:.1f} | {:.1f} |".format
    text = f"""# From a killed rank to the next step

`python -m benchmarks.restart --kills {len(found)}` on {stamp("torch", "megatron-core")}.

The tiny model of `benchmarks/restart.py` on two gloo ranks, a checkpoint every 5 steps, `tools/launch.py` with its
defaults (1 s wait before a restart): {len(found)} times SIGKILL, in turn to rank 0 and 1. Processes that wanted
a core (load average of 1 minute, itself among them): {load_before:.1f} before, {os.getloadavg()[0]:.1f} after.

| seconds from the kill to | min | median | max |
|---|---|---|---|
{row("the launcher's line: all ranks have ended", told_s.min(), np.median(told_s), told_s.max())}
{row("the end of the next training step", step_s.min(), np.median(step_s), step_s.max())}

Steps done again: {lost.min()} to {lost.max()}. Between the two lie the wait of 1 s and what every start of the run
takes: importing torch and Megatron, building the model, loading the checkpoint.
"""
    print(text)
    atomic_write(OUTPUT, text.encode())


if __name__ == "__main__":
    main()
