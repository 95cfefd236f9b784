"""Entries of a dictionary in dictd's form: `name.dict.dz` (gzip) and `name.index` (headword, offset and length)."""

import re
import string

from hmoe_megatron.tools.corpora.members import decode

BASE64 = string.ascii_uppercase + string.ascii_lowercase + string.digits + "+/"
REFERENCE = re.compile(r"\{([^{}]{1,80})\}")  # dictd's mark of another headword
SENSE_SOURCE = re.compile(
    r"\n *\[(?:1913 Webster|PJC|WordNet [\d.]+|Century Dict[^\]]*|[A-Z]{2,4})(?: \+[^\]]*)?\](?=\n|$)"
)


def number(digits: str) -> int:
    """ValueError for anything but dictd's base 64."""
    value = 0
    for digit in digits:
        value = value * 64 + BASE64.index(digit)
    return value


def entries(index: str, text: bytes) -> list[str]:
    """Every entry once, in the text's order, without those about the database, braces of references and the lines
    that name a sense's source. Raises ValueError if the index does not fit the text."""
    places = set()
    for line in index.splitlines():
        try:
            headword, offset, length = line.split("\t")[:3]
            start, end = number(offset), number(offset) + number(length)
        except ValueError:
            raise ValueError(f"dictionary index: no headword, offset and length in {line[:80]!r}") from None
        if end > len(text):
            raise ValueError(f"dictionary index: {headword[:80]!r} ends at byte {end} of {len(text)}")
        if not headword.startswith("00-database"):
            places.add((start, end))
    found = (REFERENCE.sub(r"\1", decode(text[start:end])) for start, end in sorted(places))
    return [entry for entry in (SENSE_SOURCE.sub("", entry).strip() for entry in found) if entry]
