"""What a corpus is, and how its files come to be: archives, documents, files, and last a manifest of them."""

import contextlib
import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path

from hmoe_megatron.corpora.archive import FOLDER, Archive, fetch
from hmoe_megatron.corpora.cut import is_held_out
from hmoe_megatron.corpora.near_duplicates import RULE, NearDuplicates
from hmoe_megatron.files import atomic_write, sha256_file


@dataclass
class Content:
    """What `build` made: bytes and counts of each file, and what else the manifest says."""

    data: dict[str, bytes | bytearray]
    counts: dict[str, dict[str, int]]
    notes: dict = field(default_factory=dict)


@dataclass(frozen=True)
class Corpus:
    """`build` gets {name of the package: its archive}, checked. `schema` rises when bytes or manifest change."""

    name: str
    schema: int
    archives: tuple[Archive, ...]
    files: tuple[str, ...]
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


def split(name: str, documents: Iterable[Document], evaluation: NearDuplicates | None = None) -> Content:
    """NAME_train.jsonl and NAME_valid.jsonl with every different document in exactly one of them, less those that
    have a piece of an evaluation set. Equal documents have equal hashes: none is in both files."""
    data = {part: bytearray() for part in ("train", "valid")}
    counts = {part: Counter(documents=0, text_bytes=0) for part in data}
    kept, repeated, removed, seen = Counter(), Counter(), {}, set()
    for document in documents:
        digest = hashlib.sha256(document.text.encode()).digest()
        if digest in seen:
            repeated[document.group] += 1
            continue
        seen.add(digest)
        if evaluation and (owner := evaluation.set_of(document.text, document.question)):
            removed.setdefault(document.group, Counter())[owner] += 1
            continue
        part = "valid" if is_held_out(document.text) else "train"
        data[part] += json_line({"text": document.text, "source": document.source})
        size = len(document.text.encode())
        counts[part].update(documents=1, text_bytes=size)
        kept[document.group] += size
    notes = {"text_bytes_by_group": dict(kept), "repeated_documents_dropped": dict(repeated)}
    if evaluation:
        notes["near_duplicates"] = {"rule": RULE, "removed": {group: dict(sets) for group, sets in removed.items()}}
    return Content(
        {f"{name}_{part}.jsonl": lines for part, lines in data.items()},
        {f"{name}_{part}.jsonl": dict(count) for part, count in counts.items()},
        notes,
    )


def is_whole(corpus: Corpus, folder: Path) -> bool:
    """Whether the manifest in `folder` is of this version and every file of the corpus has the hash it says."""
    try:
        manifest = json.loads(corpus.manifest(folder).read_text())
        if manifest["schema"] != corpus.schema or manifest["archives"] != [asdict(a) for a in corpus.archives]:
            return False
        return all(sha256_file(folder / name) == manifest["files"][name]["sha256"] for name in corpus.files)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def get(corpus: Corpus, output: Path, given: Iterable[Path] = ()) -> None:
    """Writes the corpus into `output`, the manifest last. Raises ValueError."""
    if is_whole(corpus, output):
        print(f"{corpus.name}: {output} has it already, whole; nothing done")
        return
    content = corpus.build(fetch(corpus.archives, output, given))
    os.makedirs(output, exist_ok=True)
    with contextlib.suppress(FileNotFoundError):
        corpus.manifest(output).unlink()  # of another version: its hashes are no longer true
    files = {}
    for name in corpus.files:
        data = content.data[name]
        atomic_write(output / name, data)
        files[name] = {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)} | content.counts[name]
    manifest = {"corpus": corpus.name, "schema": corpus.schema, "archives": [asdict(a) for a in corpus.archives],
                "files": files} | content.notes  # fmt: skip
    atomic_write(corpus.manifest(output), (json.dumps(manifest, indent=1, ensure_ascii=False) + "\n").encode())
    report(corpus, output, manifest)


def report(corpus: Corpus, output: Path, manifest: dict) -> None:
    for name, file in manifest["files"].items():
        size = f", {file['text_bytes']:,} bytes of text" if "text_bytes" in file else ""
        print(f"{output / name}: {file['documents']:,} documents{size}")
    removed = manifest.get("near_duplicates", {}).get("removed", {})
    for group, sets in removed.items():
        print(f"near-duplicates removed from {group}: " + ", ".join(f"{n} of {name}" for name, n in sets.items()))
    for archive in corpus.archives:
        print(f"source: {archive.source}\nlicence: {archive.licence}")
    if (kept := output / FOLDER).is_dir():
        print(f"{kept} holds the archives and may be deleted")
