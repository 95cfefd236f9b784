"""Inputs, calls and readings that the tests of the data tools share."""

import json
import random
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
sys.path.insert(0, str(ROOT / "tools"))
import preprocess_data  # noqa: E402

EOD_ID = 2
SP_VOCAB_SIZE = 400


def make_texts(count: int, seed: int = 0) -> list[str]:
    rng = random.Random(seed)
    words = ["".join(rng.choices("abcdefghijklmnop", k=rng.randint(1, 7))) for _ in range(300)]
    texts = []
    for number in range(count):
        lines = [" ".join(rng.choices(words, k=rng.randint(1, 9))) for _ in range(rng.randint(1, 6))]
        texts.append(f"{number}\n  " + "\n".join(lines) + "\n")
    return texts


def write_jsonl(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def argv_of(*inputs, prefix: Path, model: Path | None = None, flags: tuple = ()) -> list[str]:
    """Without a model the NullTokenizer: the text is its ids, "3 1 4", below 100. A folder is Hugging Face's."""
    kind = ["NullTokenizer", "--vocab-size", "100"]
    if model:
        kind = ["HuggingFaceTokenizer" if model.is_dir() else "SentencePieceTokenizer", "--tokenizer-model", str(model)]
    return [
        "--input",
        *map(str, inputs),
        "--output-prefix",
        str(prefix),
        "--tokenizer-type",
        kind[0],
        *flags,
        *kind[1:],
    ]


def preprocess(*inputs, prefix: Path, model: Path | None = None, flags: tuple = ()) -> int:
    """The tool's exit code."""
    return preprocess_data.main(argv_of(*inputs, prefix=prefix, model=model, flags=flags))


def read_data_set(prefix: Path, key: str = "text") -> list[list[int]]:
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    data = IndexedDataset(f"{prefix}_{key}_document")
    assert data.document_indices.tolist() == list(range(len(data) + 1))
    return [data[i].tolist() for i in range(len(data))]


def left_in(folder: Path, prefix: str = "out") -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name.lstrip(".").startswith(prefix))


def contents(folder: Path, prefix: str = "out") -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in left_in(folder, prefix)}
