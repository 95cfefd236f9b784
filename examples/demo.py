"""make demo: from a corpus to generated text and a report, on two CPU ranks (or up to two GPUs).

Leaves everything under demo/: data, tokenizer, run (checkpoint, plan, telemetry, TensorBoard), report.html, logs.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import time
from collections import deque
from pathlib import Path

from tqdm import tqdm

from hmoe_megatron.tools.machine_checks import run_settings

ROOT = Path(__file__).parents[1]
DEMO = ROOT / "demo"
RUN, DATA, LOGS = DEMO / "run", DEMO / "data", DEMO / "logs"
EXAMPLE = ROOT / "examples" / "tiny_cpu" / "hmoe_topp.args"
STEPS, RESUMED_STEPS, TOKENS, VOCABULARY = 240, 10, 200, 4096
PROMPT = "ROMEO. "

ITERATION = re.compile(r"^ step +(\d+)/(\d+) \| loss ([0-9.]+)")
VALIDATION = re.compile(r"^ step +(\d+) \| validation loss ([0-9.]+), perplexity [0-9.]+$")
RESUMED = re.compile(r"^ goes on from .*, step (\d+)")


def tool(name: str, *arguments) -> list[str]:
    """Command line of one of tools/."""
    return [sys.executable, str(ROOT / "tools" / name), *map(str, arguments)]


def run(title: str, command: list[str], log: str, on_line=lambda line: None) -> None:
    """Run a command, its output to demo/logs/LOG. If it fails, show the log's end and end the demo."""
    path, started_s, last_lines = LOGS / log, time.monotonic(), deque(maxlen=30)
    print(f"\n{title}", flush=True)
    with path.open("w") as file:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
        try:
            for line in process.stdout:
                file.write(line)
                last_lines.append(line)
                on_line(line)
        finally:
            if process.poll() is None and sys.exc_info()[0]:
                process.terminate()
            process.wait()
    if process.returncode:
        print(*last_lines, sep="", file=sys.stderr)
        sys.exit(f"demo: exit code {process.returncode} at: {title}. Whole output: {path}")
    print(f"  done in {time.monotonic() - started_s:.0f} s", flush=True)


class Progress:
    """Turns Megatron's log lines into a progress bar and the validation losses."""

    def __init__(self, total: int, first: int = 0):
        self.bar = tqdm(total=total, initial=first, unit="step", ncols=100, mininterval=2, leave=False)
        self.validation_losses: list[tuple[int, float]] = []

    def __call__(self, line: str) -> None:
        if found := RESUMED.search(line):
            self.bar.write(f"  resumed at step {found[1]}")
        elif found := ITERATION.search(line):
            self.bar.n = int(found[1])
            self.bar.set_postfix_str(f"loss {float(found[3]):.3f}")
        elif found := VALIDATION.search(line):
            step, loss = int(found[1]), float(found[2])
            if step not in dict(self.validation_losses):  # the last step is evaluated twice
                self.validation_losses.append((step, loss))
                self.bar.write(f"  step {step:4d}  validation loss {loss:.3f}")


def ranks_here() -> int:
    """Two CPU ranks, or up to two GPUs."""
    settings = run_settings()
    return 2 if settings["backend"] == "gloo" else min(2, settings["ranks"])


def train(title: str, log: str, steps: int, *more) -> list[tuple[int, float]]:
    """Train to step ``steps`` with the flags of the example; returns (step, validation loss)."""
    ranks = ranks_here()
    os.environ["NPROC_PER_NODE"] = str(ranks)
    command = [
        sys.executable,
        ROOT / "examples" / "run.py",
        EXAMPLE,
        "--train-data-path",
        DATA / "train_text_document",
        "--valid-data-path",
        DATA / "valid_text_document",
        "--tokenizer-model",
        DEMO / "tokenizer.model",
        "--save",
        RUN,
        "--tensorboard-dir",
        RUN / "tensorboard",
        "--train-iters",
        steps,
        "--lr-decay-iters",
        STEPS,
        "--save-interval",
        STEPS,
        "--expert-model-parallel-size",
        ranks,
        *more,
    ]
    progress = Progress(steps, first=STEPS if more else 0)
    try:
        run(title, [str(word) for word in command], log, progress)
    finally:
        progress.bar.close()
    return progress.validation_losses


def prepare_data() -> None:
    """Corpus, tokenizer and tokens under demo/."""
    LOGS.mkdir(parents=True, exist_ok=True)
    run("Corpus: Shakespeare", tool("get_corpus.py", "shakespeare", "--output", DATA), "corpus.log")
    train_text, valid_text = DATA / "shakespeare_train.jsonl", DATA / "shakespeare_valid.jsonl"
    run(
        f"Tokenizer: SentencePiece BPE, {VOCABULARY} pieces",
        tool("train_tokenizer.py", "--input", train_text, "--vocab-size", VOCABULARY, "--output", DEMO / "tokenizer"),
        "tokenizer.log",
    )
    for name, text in (("train", train_text), ("valid", valid_text)):
        run(
            f"Tokens: {name}",
            tool(
                "preprocess_data.py",
                "--input",
                text,
                "--output-prefix",
                DATA / name,
                "--append-eod",
                "--workers",
                2,
                "--tokenizer-type",
                "SentencePieceTokenizer",
                "--tokenizer-model",
                DEMO / "tokenizer.model",
            ),
            f"preprocess_{name}.log",
        )


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    started_s = time.monotonic()
    shutil.rmtree(RUN, ignore_errors=True)
    prepare_data()
    losses = train(f"Training: {STEPS} steps, expert parallel", "train.log", STEPS)
    train(
        f"Resuming from the checkpoint: {RESUMED_STEPS} more steps",
        "resume.log",
        STEPS + RESUMED_STEPS,
        "--load",
        RUN,
        "--exit-on-missing-checkpoint",
    )
    run(
        f"Text: {TOKENS} tokens after {PROMPT!r}",
        tool(
            "generate.py",
            "--load",
            RUN,
            "--prompt",
            PROMPT,
            "--tokens",
            TOKENS,
            "--ignore-eod",
            "--output",
            DEMO / "sample.txt",
        ),
        "generate.log",
    )
    print((DEMO / "sample.txt").read_text(), flush=True)
    page = ("--output", DEMO / "report.html", "--png", DEMO / "figures", "--sample", DEMO / "sample.txt")
    run("Report", tool("run_report.py", RUN, *page), "report.log")
    (first_step, first), (last_step, last) = losses[0], losses[-1]
    print(f"\nValidation loss {first:.3f} at step {first_step}, {last:.3f} at step {last_step}.")
    print(f"Placement plan  {(RUN / 'placement_plan.json').relative_to(ROOT)}")
    print(f"Telemetry       {(RUN / 'telemetry.jsonl').relative_to(ROOT)}")
    print(f"Report          {(DEMO / 'report.html').relative_to(ROOT)}, pictures beside it in demo/figures")
    print(f"Total           {(time.monotonic() - started_s) / 60:.1f} minutes", flush=True)


if __name__ == "__main__":
    main()
