"""The paper's six benchmarks: their files, as `tools/get_corpus.py benchmarks-eval` writes them, and their tasks in
lm-eval. No lm-eval is needed here."""

import hashlib
import importlib.metadata
import importlib.util
import json
from pathlib import Path
from typing import NamedTuple

CORPUS = "benchmarks-eval"  # of tools/get_corpus.py; its manifest is CORPUS.json


class Benchmark(NamedTuple):
    """task, folder: of lm-eval, where its task and its prompts are; the file is NAME.jsonl."""

    task: str
    folder: str


BENCHMARKS = {
    "piqa": Benchmark("piqa", "piqa"),
    "hellaswag": Benchmark("hellaswag", "hellaswag"),
    "boolq": Benchmark("boolq", "super_glue/boolq"),
    "winogrande": Benchmark("winogrande", "winogrande"),
    "siqa": Benchmark("social_iqa", "siqa"),
    "arc_easy": Benchmark("arc_easy", "arc"),
}


def require_lm_eval() -> None:
    if importlib.util.find_spec("lm_eval") is None:
        raise ValueError("the benchmarks need lm-eval: pip install 'hmoe-megatron[eval]', or give --tasks none and "
                         "text with --input")  # fmt: skip


def lm_eval_version() -> str:
    return importlib.metadata.version("lm_eval")


def check_names(names: list[str]) -> None:
    for name in names:
        if name not in BENCHMARKS:
            raise ValueError(f"--tasks {name}: no such benchmark; there are {', '.join(BENCHMARKS)}")
    if len(set(names)) < len(names):
        raise ValueError(f"--tasks {','.join(names)}: name each benchmark once")


def read_rows(folder: str | Path, name: str) -> list[dict]:
    """The questions, whole and unaltered since they were fetched. Raises ValueError with the command that mends it."""
    folder = Path(folder)
    path, manifest = folder / f"{name}.jsonl", folder / f"{CORPUS}.json"
    remedy = f"python tools/get_corpus.py {CORPUS} --output {folder}"
    try:
        data, expected = path.read_bytes(), json.loads(manifest.read_bytes())["files"][path.name]["sha256"]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise ValueError(f"--benchmarks {folder}: {name} can't be read ({error}): {remedy}") from None
    if hashlib.sha256(data).hexdigest() != expected:
        raise ValueError(f"--benchmarks {folder}: {path.name} is not the file of {manifest.name}: {remedy}")
    return [json.loads(line) for line in data.splitlines()]


def lm_eval_row(name: str, row: dict) -> dict:
    """A row with the columns that lm-eval's task reads: BoolQ's are those of SuperGLUE, where the answer is a label."""
    return row | {"label": int(row["answer"])} if name == "boolq" else row
