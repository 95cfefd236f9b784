"""A corpus: pinned archives in; files of JSON lines, and last a manifest of them, out."""

import contextlib
import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path

from hmoe_megatron.files import atomic_write, sha256_file
from hmoe_megatron.tools.corpora.archive import FOLDER, Archive, fetch
from hmoe_megatron.tools.corpora.decontamination import RULE, EvaluationSets

HELD_OUT_PERCENT = 5


@dataclass
class Content:
    """Bytes and counts of each file, and what else the manifest says."""

    data: dict[str, bytes | bytearray]
    counts: dict[str, dict[str, int]]
    notes: dict = field(default_factory=dict)


@dataclass(frozen=True)
class Corpus:
    """`build` gets {name of the package: its archive}, checked. `schema` rises when bytes or manifest change."""

    name: str
    schema: int
    archives: tuple[Archive, ...]
    build: Callable[[dict[str, Path]], Content]

    def manifest(self, folder: Path) -> Path:
        return folder / f"{self.name}.json"


@dataclass(frozen=True)
class Document:
    text: str
    source: str
    group: str  # what the manifest counts by: package or set
    question: str = ""


def json_line(record: dict) -> bytes:
    return (json.dumps(record, ensure_ascii=False) + "\n").encode()


def is_held_out(text: str) -> bool:
    """Depends on the document's text only, so it stays the same when others come or go."""
    return int(hashlib.sha256(text.encode()).hexdigest()[:8], 16) % 100 < HELD_OUT_PERCENT


def split(name: str, documents: Iterable[Document], evaluation: EvaluationSets | None = None) -> Content:
    """NAME_train.jsonl and NAME_valid.jsonl with every different document in exactly one of them, less those that
    have a piece of an evaluation set. Equal documents have equal hashes: none is in both files."""
    files = train, valid = f"{name}_train.jsonl", f"{name}_valid.jsonl"
    data = {file: bytearray() for file in files}
    counts = {file: {"documents": 0, "text_bytes": 0} for file in files}
    kept, repeated, removed, seen = Counter(), Counter(), {}, set()
    for document in documents:
        text = document.text.encode()
        digest = hashlib.sha256(text).digest()
        if digest in seen:
            repeated[document.group] += 1
            continue
        seen.add(digest)
        if evaluation and (owner := evaluation.find(document.text, document.question)):
            removed.setdefault(document.group, Counter())[owner] += 1
            continue
        file = valid if is_held_out(document.text) else train
        data[file] += json_line({"text": document.text, "source": document.source})
        counts[file]["documents"] += 1
        counts[file]["text_bytes"] += len(text)
        kept[document.group] += len(text)
    notes = {"text_bytes_by_group": kept, "repeated_documents_dropped": repeated}
    if evaluation:
        notes["near_duplicates"] = {"rule": RULE, "removed": removed}
    return Content(data, counts, notes)


def is_complete(corpus: Corpus, folder: Path) -> bool:
    """Whether the manifest in `folder` is of this version and every file has the hash that it lists."""
    try:
        manifest = json.loads(corpus.manifest(folder).read_text())
        files, expected = manifest["files"], [corpus.schema, [asdict(archive) for archive in corpus.archives]]
        if [manifest["schema"], manifest["archives"]] != expected:
            return False
        return bool(files) and all(sha256_file(folder / name) == file["sha256"] for name, file in files.items())
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return False


def get(corpus: Corpus, output: Path, given: Iterable[Path] = ()) -> None:
    """Write the corpus into `output`, the manifest last. Raises ValueError."""
    if is_complete(corpus, output):
        print(f"{corpus.name}: {output} has all of it; nothing done")
        return
    content = corpus.build(fetch(corpus.archives, output, given))
    os.makedirs(output, exist_ok=True)
    with contextlib.suppress(FileNotFoundError):
        corpus.manifest(output).unlink()  # of another version: its hashes are no longer true
    files = {}
    for name, data in content.data.items():
        atomic_write(output / name, data)
        files[name] = {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)} | content.counts[name]
    manifest = {"corpus": corpus.name, "schema": corpus.schema, "archives": [asdict(a) for a in corpus.archives]}
    manifest |= {"files": files} | content.notes
    atomic_write(corpus.manifest(output), (json.dumps(manifest, indent=1, ensure_ascii=False) + "\n").encode())
    report(corpus, output, manifest)


def report(corpus: Corpus, output: Path, manifest: dict) -> None:
    for name, file in manifest["files"].items():
        size = f", {file['text_bytes']:,} bytes of text" if "text_bytes" in file else ""
        print(f"{output / name}: {file['documents']:,} documents{size}")
    for group, sets in manifest.get("near_duplicates", {"removed": {}})["removed"].items():
        print(f"near-duplicates removed from {group}: " + ", ".join(f"{n} of {name}" for name, n in sets.items()))
    for archive in corpus.archives:
        print(f"source: {archive.source}\nlicence: {archive.licence}")
    if (kept := output / FOLDER).is_dir():
        print(f"{kept} holds the archives and may be deleted")
