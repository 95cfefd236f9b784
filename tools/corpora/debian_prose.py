"""Manuals, dictionaries and an FAQ of Debian 12: technical and continuous English prose, 112 MB.

HTML pages and manual pages are documents, whole up to MAX_PAGE_CHARS; entries of a dictionary are grouped in their
order. Left out: pages of less than MIN_PAGE_CHARS (mostly lists of links), indexes, the kernel's translations, and
the sources and manual pages that hold the text of the HTML again.
"""

import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from hmoe_megatron.tools.corpora.archive import Archive
from hmoe_megatron.tools.corpora.benchmarks import EVALUATION, evaluation_sets
from hmoe_megatron.tools.corpora.corpus import Corpus, Document, split
from hmoe_megatron.tools.corpora.dictionary import entries
from hmoe_megatron.tools.corpora.html_text import html_text
from hmoe_megatron.tools.corpora.manual_text import manual_text
from hmoe_megatron.tools.corpora.members import decode, gunzip, tar_members

MIN_PAGE_CHARS, MAX_PAGE_CHARS = 300, 64_000
ENTRIES_CHARS = 8_000
# name, version, SHA-256; licence
PINS = """\
linux-doc-6.1 6.1.176-1 0d843674607703b9ef8c1db5e715c38ed52ff23574feabfe0d961d552126859f
    GPL-2; Copyright 1991-2012 Linus Torvalds and many others
python3.11-doc 3.11.2-6+deb12u8 50eb63e7f636c4281e9ce1b8f10386f1def42159eddce34fc1f41c46261df71b
    PSF-2; examples 0BSD; Copyright Python Software Foundation
perl-doc 5.36.0-7+deb12u3 e9e3564ff5ade27de0585835f2acad769bcc545c0a0045a9f55d5401f27f7591
    GPL-1+ or Artistic; some modules their own
anarchism 15.3-3 cf21c10948b00e923c62eb31c39a3390413fa26c5ee0e3b925feb0ec7fe42948
    GPL-2; Copyright 1995-2017 The Anarchist FAQ Editorial Collective
postgresql-doc-15 15.18-0+deb12u1 3c598277a463c44d672daa2c335deb8d8252e1852fb025fd4578ea2d9a1b90f0
    PostgreSQL licence; Copyright PostgreSQL Global Development Group
dict-gcide 0.48.5+nmu2 7b0af5cfde3cbdef5e9d6e78f92ec335ced7c2790f37a40f49bebc6f7347ac0f
    GPL-2+; Copyright MICRA, Inc. and Patrick Cassidy
dict-foldoc 20230119-1 745cbedb55c2da609cc88ee0284e9d11a67a11ae3709daf7bad0e895ac3294c3
    GFDL-1.1+; refer to it as "The Free On-line Dictionary of Computing, http://foldoc.org/, Editor Denis Howe"
dict-jargon 4.4.7-3.1 405f8168d7994ed2cb71407bb95493daec2e9aa66fc0461dafa74a9d6728a8c1
    public domain; please cite as "Jargon File 4.4.7"
"""
PACKAGES = tuple(
    Archive("deb", name, version, f"{name}_{version}_all.deb", sha256, f"Debian package {name} {version}", licence)
    for name, version, sha256, licence in (pin.split(" ", 3) for pin in PINS.replace("\n    ", " ").splitlines())
)
HTML_PAGES = {
    "linux-doc-6.1": r"linux-doc-6\.1/html/(?!_|genindex|search|translations/)(.+)\.html",
    "python3.11-doc": r"python3\.11/html/(?!_|contents\.|genindex|py-modindex|search)(.+)\.html",
    "anarchism": r"anarchism/html/(?!index\.)(.+)\.html",
    "postgresql-doc-15": r"postgresql-doc-15/html/(?!bookindex|index\.)(.+)\.html",
}
MANUAL_PAGE = re.compile(r"\./usr/share/man/(man[13]/.+)\.gz")


def pack(pieces: Iterable[str], max_chars: int) -> list[str]:
    """Pieces joined by blank lines to documents of at most max_chars, in order. A longer piece stays whole."""
    documents, size = [], 0
    for piece in pieces:
        if documents and size + len(piece) + 2 <= max_chars:
            documents[-1].append(piece)
            size += len(piece) + 2
        else:
            documents.append([piece])
            size = len(piece)
    return ["\n\n".join(pieces) + "\n" for pieces in documents]


def cut_page(text: str, max_chars: int) -> list[str]:
    """One document; a page of more than max_chars is cut at its blank lines."""
    return [text + "\n"] if len(text) <= max_chars else pack(re.split(r"\n{2,}", text), max_chars)


def pages(name: str, archive: Path) -> Iterator[tuple[str, str]]:
    """(name of the page, its text) of a package of HTML or manual pages."""
    if name == "perl-doc":
        for page, data in tar_members(archive, MANUAL_PAGE):
            yield page, manual_text(decode(gunzip(page, data)))
        return
    for page, data in tar_members(archive, re.compile(r"\./usr/share/doc/" + HTML_PAGES[name])):
        yield page, html_text(decode(data))


def dictionary(archive: Path) -> list[str]:
    files = dict(tar_members(archive, re.compile(r"\./usr/share/dictd/[a-z]+\.(index|dict\.dz)")))
    if set(files) != {"index", "dict.dz"}:
        raise ValueError(f"{archive}: no dictionary and index in it; do not use this archive")
    return entries(files["index"].decode(), gunzip(str(archive), files["dict.dz"]))


def documents(paths: dict[str, Path]) -> Iterator[Document]:
    for archive in PACKAGES:
        name, count = archive.name, 0
        if name.startswith("dict-"):
            for count, text in enumerate(pack(dictionary(paths[name]), ENTRIES_CHARS), 1):
                yield Document(text, f"{name}/{count}", name)
        else:
            for page, text in pages(name, paths[name]):
                count += 1
                if len(text) >= MIN_PAGE_CHARS:
                    yield from (Document(part, f"{name}/{page}", name) for part in cut_page(text, MAX_PAGE_CHARS))
        if not count:
            raise ValueError(f"{paths[name]}: no page in it; give the archive of {archive.requirement}")


CORPUS = Corpus(
    name="debian-prose",
    schema=1,
    archives=(*PACKAGES, EVALUATION),
    build=lambda paths: split("debian-prose", documents(paths), evaluation_sets(paths)),
)
