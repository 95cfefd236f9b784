"""The paper's six benchmarks: their files, as `tools/get_corpus.py benchmarks-eval` writes them, and their tasks in
lm-eval. No lm-eval is needed here."""

import hashlib
import importlib.util
import json
from pathlib import Path

CORPUS = "benchmarks-eval"
# The file is NAME.jsonl: (lm-eval's task, the folder of its prompts).
BENCHMARKS = {
    "piqa": ("piqa", "piqa"),
    "hellaswag": ("hellaswag", "hellaswag"),
    "boolq": ("boolq", "super_glue/boolq"),
    "winogrande": ("winogrande", "winogrande"),
    "siqa": ("social_iqa", "siqa"),
    "arc_easy": ("arc_easy", "arc"),
}


def require_lm_eval() -> None:
    if importlib.util.find_spec("lm_eval") is None:
        remedy = "pip install 'hmoe-megatron[eval]', or give --tasks none and text with --input"
        raise ValueError(f"the benchmarks need lm-eval: {remedy}")


def check_names(names: list[str]) -> None:
    for name in names:
        if name not in BENCHMARKS:
            raise ValueError(f"--tasks {name}: no such benchmark; there are {', '.join(BENCHMARKS)}")
    if len(set(names)) < len(names):
        raise ValueError(f"--tasks {','.join(names)}: name each benchmark once")


def read_rows(folder: str | Path, name: str) -> list[dict]:
    """The questions, checked by the SHA-256 in the corpus's manifest. Raises ValueError with the command to run."""
    path, manifest = Path(folder, f"{name}.jsonl"), Path(folder, f"{CORPUS}.json")
    remedy = f"python tools/get_corpus.py {CORPUS} --output {folder}"
    try:
        data, expected = path.read_bytes(), json.loads(manifest.read_bytes())["files"][path.name]["sha256"]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise ValueError(f"--benchmarks {folder}: {name} can't be read ({error}): {remedy}") from None
    if hashlib.sha256(data).hexdigest() != expected:
        raise ValueError(f"--benchmarks {folder}: {path.name} is not the file of {manifest.name}: {remedy}")
    return [json.loads(line) for line in data.splitlines()]
