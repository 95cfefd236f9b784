"""Text to token files: tools/preprocess_data.py against Megatron's own way and datatrove's tokenizer stage.

python -m benchmarks.data --corpus DIR [--datatrove DIR]. DIR of --corpus: `tools/get_corpus.py debian-prose`, made if
it is not there. DIR of --datatrove: where `pip install --target DIR datatrove` put it. Writes benchmarks/data.md.
"""

import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import NamedTuple

import psutil

from benchmarks.machine import ROOT

OUTPUT = ROOT / "benchmarks" / "data.md"
CORPUS = "debian-prose"
VOCAB_SIZE = 32_000
VOCABULARIES = {
    "byte-level BPE": ("byte-level-bpe", "HuggingFaceTokenizer", "bpe"),
    "SentencePiece": ("sentencepiece", "SentencePieceTokenizer", "sp.model"),
}
SAMPLE_S = 0.05
LONG_LINE_BYTES = 200 << 20
BIG_INPUT_BYTES = 1_000_000_000


class Run(NamedTuple):
    """wall_s, cpu_s: of the command and its children; peak_mb: the largest sum over its processes of proportional set
    sizes, which counts shared memory once; startup_s: of the same command on one short line."""

    wall_s: float
    cpu_s: float
    peak_mb: float
    tokens: int
    sha256: str

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.wall_s


def measured(command: list, environment: dict | None = None) -> tuple[float, float, float]:
    """(seconds, processor seconds, peak MB) of a command and all its children. SystemExit if it fails."""
    before, started_s = os.times(), time.monotonic()
    process = subprocess.Popen([*map(str, command)], env=os.environ | {"OMP_NUM_THREADS": "1", **(environment or {})},
                               cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)  # fmt: skip
    peak = [0.0]
    watcher = threading.Thread(target=_watch, args=(process.pid, peak), daemon=True)
    watcher.start()
    said, _ = process.communicate()
    wall_s, after = time.monotonic() - started_s, os.times()
    if process.returncode:
        sys.exit(f"{' '.join(map(str, command))}: exit code {process.returncode}\n{said[-3000:]}")
    cpu_s = after.children_user + after.children_system - before.children_user - before.children_system
    return wall_s, cpu_s, peak[0]


def _watch(pid: int, peak: list[float]) -> None:
    while psutil.pid_exists(pid):
        total = 0
        try:
            root = psutil.Process(pid)
            for process in [root, *root.children(recursive=True)]:
                total += process.memory_full_info().pss
        except psutil.Error:
            pass
        peak[0] = max(peak[0], total / 1e6)
        time.sleep(SAMPLE_S)


def ours(corpus: Path, output: Path, kind: str, model: Path, workers: int, *flags) -> list:
    return [sys.executable, "tools/preprocess_data.py", "--input", corpus, "--output-prefix", output, "--append-eod",
            "--tokenizer-type", kind, "--tokenizer-model", model, "--workers", workers, *flags]  # fmt: skip


def stock(corpus: Path, output: Path, kind: str, model: Path, workers: int) -> list:
    return [sys.executable, "-m", "benchmarks.stock_preprocess", corpus, output, kind, model, workers]


def datatrove(corpus: Path, output: Path, model: Path, workers: int) -> list:
    return [sys.executable, "-m", "benchmarks.datatrove_tokenizer", corpus, output, model / "tokenizer.json", workers]
