"""Entries of a dictionary in dictd's form: `name.dict.dz` (gzip) and `name.index` (headword, offset and length)."""

import re

from hmoe_megatron.corpora.cut import decode

BASE64 = {letter: value for value, letter in enumerate(
    "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/")}  # fmt: skip
REFERENCE = re.compile(r"\{([^{}]{1,80})\}")  # dictd's mark of another headword
SENSE_SOURCE = re.compile(r"\n *\[(?:1913 Webster|PJC|WordNet [\d.]+|Century Dict[^\]]*|[A-Z]{2,4})(?: \+[^\]]*)?\]"
                          r"(?=\n|$)")  # fmt: skip


def number(digits: str) -> int:
    value = 0
    for digit in digits:
        value = value * 64 + BASE64[digit]
    return value


def entries(index: str, text: bytes) -> list[str]:
    """Every entry once, in the text's order, without those about the database, braces of references and the lines
    that name a sense's source. Raises ValueError if the index does not fit the text."""
    places = set()
    for line in index.splitlines():
        try:
            headword, offset, length = line.split("\t")[:3]
            start, end = number(offset), number(offset) + number(length)
        except (KeyError, ValueError):
            raise ValueError(f"dictionary index: no headword, offset and length in {line[:80]!r}") from None
        if end > len(text):
            raise ValueError(f"dictionary index: {headword[:80]!r} ends at byte {end} of {len(text)}")
        if not headword.startswith("00-database"):
            places.add((start, end))
    found = []
    for start, end in sorted(places):
        entry = REFERENCE.sub(r"\1", decode(text[start:end]))
        found.append(SENSE_SOURCE.sub("", entry).strip())
    return [entry for entry in found if entry]
