"""One record: cut out of a block, parsed, found good or bad. Imports no torch.

A record that is not usable is a `BadRecord` with one of `BAD_KINDS`.
"""

import json
import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from hmoe_megatron.tools.data_prep.sources import KEPT_OF_LONG_RECORD_BYTES, Block

BAD_KINDS = (
    "too_long",
    "blank_line",
    "not_utf8",
    "broken_json",
    "not_an_object",
    "missing_key",
    "null",
    "not_a_string",
    "empty",
    "tokenizer_error",
    "no_tokens",
    "id_out_of_range",
)
BLANK_LINES = re.compile(rb"(?:\r?\n){2,}")
BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class Bad(NamedTuple):
    """A record of the quarantine. line: from 0 in the block; raw.encode("utf-8", "surrogateescape") gives the input's
    bytes back, of a long record their start."""

    line: int
    reason: str
    detail: str
    raw: str


class Good(NamedTuple):
    """A record with the text of each key. raw: as it came; a row of Parquet is a tuple."""

    line: int
    texts: list[str]
    raw: bytes | tuple


class BadRecord(Exception):
    """A line that cannot become a document: `kind` is one of BAD_KINDS, `detail` says what is wrong."""

    def __init__(self, kind: str, detail: str):
        assert kind in BAD_KINDS, f"unknown kind of bad record: {kind}"
        super().__init__(f"{kind}: {detail}")
        self.kind, self.detail = kind, detail


def parse_block(block: Block, kind: str, keys: Sequence[str], max_record_bytes: int) -> Iterator[Good | Bad]:
    """The block's records in their order. kind: of the block's source."""
    if kind == "parquet":
        yield from (_parse(number, row, _texts_of_row, keys, max_record_bytes) for number, row in enumerate(block.data))
        return
    if block.is_cut:
        yield _too_long(block.line, block.data, max_record_bytes)
        return
    parse = parse_record if kind == "json" else _whole_text
    for line, data in _split(block.data, kind):
        yield _parse(line, data, parse, keys, max_record_bytes)


def count_lines(block: Block, kind: str) -> int:
    """By how much the numbers of lines, or rows, go on over a block."""
    if kind == "parquet":
        return len(block.data)
    if block.is_cut:
        return block.lines
    return block.data.count(b"\n") or 1


def _split(data: bytes, kind: str) -> Iterator[tuple[int, bytes]]:
    """(line from 0, the record without its line end). Empty lines of plain text separate and are no records."""
    if kind in ("json", "line"):
        lines = data.split(b"\n")
        if not lines[-1]:
            lines.pop()
        yield from ((number, line) for number, line in enumerate(lines) if kind == "json" or line.strip(b"\r"))
    elif kind == "paragraph":
        start = line = 0
        for end, after in [*(mark.span() for mark in BLANK_LINES.finditer(data)), (len(data), len(data))]:
            if paragraph := data[start:end].strip(b"\r\n"):
                lead = data[start:end].index(paragraph)
                yield line + data.count(b"\n", start, start + lead), paragraph
            line, start = line + data.count(b"\n", start, after), after
    else:
        yield 0, data


def _parse(line: int, record, parse, keys: Sequence[str], max_record_bytes: int) -> Good | Bad:
    size = len(record) if isinstance(record, bytes) else max(len(text or b"") for text in record)
    if size > max_record_bytes:
        return _too_long(
            line, record if isinstance(record, bytes) else max(record, key=lambda t: len(t or b"")), max_record_bytes
        )
    try:
        return Good(line, parse(record, keys), record)
    except BadRecord as bad:
        return Bad(line, bad.kind, bad.detail, raw_text(record, keys))


def raw_text(record: bytes | tuple, keys: Sequence[str]) -> str:
    """The record as the quarantine keeps it; a row of Parquet as a JSON object."""
    if isinstance(record, tuple):
        values = (None if text is None else text.decode("utf-8", "surrogateescape") for text in record)
        return json.dumps(dict(zip(keys, values, strict=True)))
    return record.decode("utf-8", "surrogateescape")


def _too_long(line: int, start: bytes, max_record_bytes: int) -> Bad:
    kept_bytes = min(KEPT_OF_LONG_RECORD_BYTES, max_record_bytes)  # what is there of it wherever a block ends
    kept = start.lstrip(b"\r\n")[:kept_bytes].decode("utf-8", "surrogateescape")
    return Bad(line, "too_long", f"more than {max_record_bytes} bytes; its start follows", kept)


def _whole_text(data: bytes, keys: Sequence[str]) -> list[str]:
    try:
        return [_checked(data.removeprefix(BYTE_ORDER_MARK).decode(), "the text")] * len(keys)
    except UnicodeDecodeError as error:
        raise BadRecord("not_utf8", f"byte {error.start + 1}: {error.reason}") from error


def _texts_of_row(row: Sequence[bytes | None], keys: Sequence[str]) -> list[str]:
    for key, text in zip(keys, row, strict=True):
        if text is None:
            raise BadRecord("null", f"{key!r} is null")
    try:
        return [_checked(text.decode(), repr(key)) for key, text in zip(keys, row, strict=True)]
    except UnicodeDecodeError as error:
        raise BadRecord("not_utf8", f"byte {error.start + 1}: {error.reason}") from error


def parse_record(line: bytes, keys: Sequence[str]) -> list[str]:
    """The texts under `keys` of one JSON object, none of them only white space. Raises BadRecord."""
    if not line.strip():
        raise BadRecord("blank_line", "the line holds no record")
    try:
        record = json.loads(line.removeprefix(BYTE_ORDER_MARK).decode("utf-8"))
    except UnicodeDecodeError as error:
        raise BadRecord("not_utf8", f"byte {error.start + 1} of the line: {error.reason}") from error
    except (ValueError, RecursionError) as error:
        raise BadRecord("broken_json", str(error)) from error
    if not isinstance(record, dict):
        raise BadRecord("not_an_object", f"the record is a {type(record).__name__}, not an object")
    return [_text_under(key, record) for key in keys]


def _text_under(key: str, record: dict) -> str:
    if key not in record:
        texts = [name for name, value in record.items() if isinstance(value, str)]
        other = f": give --json-keys {texts[0]}" if texts else ""
        raise BadRecord(
            "missing_key", f"no key {key!r}; it has {', '.join(map(repr, list(record)[:8])) or 'none'}{other}"
        )
    text = record[key]
    if text is None:
        raise BadRecord("null", f"{key!r} is null")
    if not isinstance(text, str):
        raise BadRecord("not_a_string", f"{key!r} is a {type(text).__name__}")
    return _checked(text, repr(key))


def _checked(text: str, name: str) -> str:
    if not text or text.isspace():
        raise BadRecord("empty", f"{name} is empty or only white space")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:  # "\ud800" is legal JSON and no character
        raise BadRecord("not_utf8", f"{name} holds half of a surrogate pair at character {error.start + 1}") from error
    return text
