"""Bytes to text, texts to documents, and which of them are held out."""

import hashlib
import re
from collections.abc import Iterable

HELD_OUT_PERCENT = 5


def is_held_out(text: str) -> bool:
    """Depends on the document's text only, so it stays the same when others come or go."""
    return int(hashlib.sha256(text.encode()).hexdigest()[:8], 16) % 100 < HELD_OUT_PERCENT


def decode(data: bytes) -> str:
    """UTF-8, else what was usual before it: GCIDE has a byte of that."""
    try:
        return data.decode()
    except UnicodeDecodeError:
        return data.decode("cp1252", errors="replace")


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
