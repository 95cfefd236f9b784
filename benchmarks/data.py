"""Text to token files: tools/preprocess_data.py against Megatron's own way and datatrove's tokenizer stage.

python -m benchmarks.data --corpus DIR [--datatrove DIR]. DIR of --corpus: `tools/get_corpus.py debian-prose`, made if
it is not there. DIR of --datatrove: where `pip install --target DIR --no-deps datatrove loguru multiprocess dill
humanize` put it. Writes benchmarks/data.md.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import psutil

from benchmarks.machine import ROOT, stamp
from hmoe_megatron.files import atomic_write, sha256_file

OUTPUT = ROOT / "benchmarks" / "data.md"
CORPUS = "debian-prose"
VOCAB_SIZE = 32_000
VOCABULARIES = {
    "byte-level BPE": ("byte-level-bpe", "HuggingFaceTokenizer", "bpe"),
    "SentencePiece": ("sentencepiece", "SentencePieceTokenizer", "sp.model"),
}
TRAIN_BYTES = 30_000_000  # of text that the tokenizers see
SAMPLE_S = 0.5  # a look costs some 20 ms of processor time
LONG_LINE_BYTES = 200 << 20
BIG_INPUT_BYTES = 1_000_000_000


class Run(NamedTuple):
    """wall_s, cpu_s: of the command and its children; peak_mb: the largest sum over its processes of proportional set
    sizes, which counts shared memory once; sha256: of the token file."""

    way: str
    workers: int
    wall_s: float
    cpu_s: float
    peak_mb: float
    tokens: int
    sha256: str


def measured(command: list, environment: dict | None = None) -> tuple[float, float, float]:
    """(seconds, processor seconds, peak MB) of a command and all its children. SystemExit if it fails."""
    before, started_s = os.times(), time.monotonic()
    process = subprocess.Popen(
        [*map(str, command)],
        env=os.environ | {"OMP_NUM_THREADS": "1", **(environment or {})},
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
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
        time.sleep(SAMPLE_S)
        total = 0
        try:
            root = psutil.Process(pid)
            for process in [root, *root.children(recursive=True)]:
                total += process.memory_full_info().pss
        except psutil.Error:  # a process that has just ended
            continue
        peak[0] = max(peak[0], total / 1e6)


def ours(corpus: Path, output: Path, kind: str, model: Path, workers: int, *flags) -> list:
    return [
        sys.executable,
        "tools/preprocess_data.py",
        "--input",
        corpus,
        "--output-prefix",
        output,
        "--append-eod",
        "--tokenizer-type",
        kind,
        "--tokenizer-model",
        model,
        "--workers",
        workers,
        *flags,
    ]


def stock(corpus: Path, output: Path, kind: str, model: Path, workers: int) -> list:
    return [sys.executable, "-m", "benchmarks.stock_preprocess", corpus, output, kind, model, workers]


def datatrove(corpus: Path, output: Path, kind: str, model: Path, workers: int) -> list:
    return [sys.executable, "-m", "benchmarks.datatrove_tokenizer", corpus, output, model / "tokenizer.json", workers]


def token_file(output: Path) -> Path:
    found = [
        path
        for name in (f"{output.name}_text_document.bin", f"{output.name}.bin", f"{output.name}/*.ds")
        for path in output.parent.glob(name)
    ]
    assert len(found) == 1, found
    return found[0]


def run_all(corpus: Path, folder: Path, kind: str, model: Path, datatrove_dir: Path | None) -> Iterator[Run]:
    """Each way once a round, in turn. All token files must be equal to the byte."""
    ways = {"this tool": ours, "Megatron's way": stock}
    if datatrove_dir and kind == "HuggingFaceTokenizer":
        ways["datatrove's stage"] = datatrove
    environment = {"PYTHONPATH": f"{ROOT}{os.pathsep}{datatrove_dir or ''}"}
    for workers in (1, 2):
        for way, command in ways.items():
            if way == "datatrove's stage" and workers > 1:
                continue  # one file is one task
            output = folder / f"{kind}-{way[:4]}-{workers}"
            wall_s, cpu_s, peak_mb = measured(command(corpus, output, kind, model, workers), environment)
            file = token_file(output)
            tokens = file.stat().st_size // np.dtype(np.uint16).itemsize  # VOCAB_SIZE is below 65,500
            run = Run(way, workers, wall_s, cpu_s, peak_mb, tokens, sha256_file(file))
            print(f"  {run}", flush=True)
            file.unlink()
            yield run


def train(corpus: Path, folder: Path, kind: str, output: str) -> Path:
    command = [
        sys.executable,
        "tools/train_tokenizer.py",
        "--input",
        corpus,
        "--vocab-size",
        VOCAB_SIZE,
        "--type",
        kind,
        "--max-train-bytes",
        TRAIN_BYTES,
        "--output",
        folder / output.split(".")[0],
    ]
    subprocess.run([*map(str, command)], cwd=ROOT, check=True)
    return folder / output


def startup(corpus: Path, folder: Path, kind: str, model: Path, command) -> float:
    """Seconds of the same command on the first line only: imports, mostly."""
    line = folder / "line.jsonl"
    with corpus.open("rb") as file:
        line.write_bytes(file.readline())
    output = folder / f"line-{command.__name__}-{kind}"
    return measured(command(line, output, kind, model, 1), {"PYTHONPATH": str(ROOT)})[0]


def big(corpus: Path, folder: Path, kind: str, model: Path) -> tuple[Run, str]:
    """This tool on 1 GB of text with a line of 200 MB in its middle, which is skipped and counted."""
    path = folder / "big.jsonl"
    with path.open("wb") as file:
        data = corpus.read_bytes()
        while file.tell() < BIG_INPUT_BYTES // 2:
            file.write(data)
        file.write(b'{"text": "' + b"a" * LONG_LINE_BYTES + b'"}\n')
        while file.tell() < BIG_INPUT_BYTES + LONG_LINE_BYTES:
            file.write(data)
    output = folder / "big"
    wall_s, cpu_s, peak_mb = measured(ours(path, output, kind, model, 2, "--on-bad-record", "skip"))
    file = token_file(output)
    run = Run("this tool", 2, wall_s, cpu_s, peak_mb, file.stat().st_size // 2, sha256_file(file))
    bad = json.loads((folder / "big_text_document.json").read_text())["counts"]["bad_records"]
    size = f"{path.stat().st_size / 1e6:,.0f} MB"
    path.unlink()
    return run, f"{size}; bad records: {bad}"


def repeated(corpus: Path, folder: Path, copies: int) -> Path:
    """The corpus that often, in one file."""
    path = folder / corpus.name
    with path.open("wb") as file:
        for _ in range(copies):
            file.write(corpus.read_bytes())
    return path


def table(runs: list[Run], startups: dict[str, float]) -> str:
    rows = [
        "| way | workers | seconds | million tokens/s | processor seconds | peak MB | times Megatron's | "
        "without the start: million tokens/s | times Megatron's |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for run in runs:
        stock = next(other for other in runs if other.way == "Megatron's way" and other.workers == run.workers)
        alone = times = ""
        if {run.way, stock.way} <= startups.keys():
            alone_s = run.wall_s - startups[run.way]
            alone = f"{run.tokens / alone_s / 1e6:.2f}"
            times = f"{(stock.wall_s - startups[stock.way]) / alone_s:.2f}"
        rows.append(
            f"| {run.way} | {run.workers} | {run.wall_s:.1f} | {run.tokens / run.wall_s / 1e6:.2f} | "
            f"{run.cpu_s:.1f} | {run.peak_mb:.0f} | {stock.wall_s / run.wall_s:.2f} | {alone} | {times} |"
        )
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, default=ROOT / "data" / CORPUS)
    parser.add_argument("--datatrove", type=Path)
    parser.add_argument(
        "--copies",
        type=int,
        default=4,
        help="of the corpus in the input: the start weighs little in what users have (default: 4)",
    )
    parser.add_argument("--skip-big", action="store_true", help="leave out the 1 GB")
    args = parser.parse_args()
    subprocess.run([sys.executable, "tools/get_corpus.py", CORPUS, "--output", args.corpus], cwd=ROOT, check=True)
    corpus = args.corpus / f"{CORPUS}_train.jsonl"
    load = os.getloadavg()[0]
    sections = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for title, (type_, kind, output) in VOCABULARIES.items():
            model = train(corpus, folder, type_, output)
            text = repeated(corpus, folder, args.copies)
            startups = {
                "this tool": startup(corpus, folder, kind, model, ours),
                "Megatron's way": startup(corpus, folder, kind, model, stock),
            }
            stock_s = startups["Megatron's way"]
            runs = list(run_all(text, folder, kind, model, args.datatrove))
            assert len({run.sha256 for run in runs}) == 1, "the token files differ"
            sections.append(
                f"## {title}, {VOCAB_SIZE:,} entries\n{runs[0].tokens:,} tokens; all token files are equal "
                f"to the byte (SHA-256 {runs[0].sha256[:16]}). Start, on one line: this tool "
                f"{startups['this tool']:.1f} s, Megatron's way {stock_s:.1f} s."
                f"\n\n{table(runs, startups)}\n"
            )
        if not args.skip_big:
            run, about = big(corpus, folder, "HuggingFaceTokenizer", folder / "bpe")
            sections.append(
                f"## Any size\n{about}. This tool, byte-level BPE, 2 workers: {run.wall_s:.0f} s, "
                f"{run.tokens:,} tokens, {run.tokens / run.wall_s / 1e6:.2f} million tokens/s, peak "
                f"{run.peak_mb:.0f} MB.\n"
            )
    command = f"python -m benchmarks.data --copies {args.copies}" + (" --datatrove DIR" if args.datatrove else "")
    text = f"""# Text to token files

`{command}` on {stamp("torch", "megatron-core", "tokenizers", "sentencepiece", "tiktoken")}.

{corpus.name} of `tools/get_corpus.py {CORPUS}`, {corpus.stat().st_size / 1e6:,.0f} MB, {args.copies} times in one file,
`--append-eod`. Each way once in turn on the same machine; processes that wanted a core before (load average of 1
minute): {load:.1f}. "Megatron's way" is `benchmarks/stock_preprocess.py`: a pool of processes that call its tokenizer
text by text, one loop that feeds its builder. Peak: the largest sum of proportional set sizes over all processes,
looked at every {SAMPLE_S * 1000:.0f} ms.

"""
    atomic_write(OUTPUT, (text + "\n".join(sections)).encode())
    print(f"{OUTPUT}: written")


if __name__ == "__main__":
    main()
