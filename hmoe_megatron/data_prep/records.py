"""Text records: what the tools that prepare data share. Imports no torch.

A record is one line of a JSON Lines file, plain or gzip. A line that is not a usable record is a
`BadRecord` with one of `BAD_KINDS`; a file that cannot be read at all is a ValueError.
"""

import gzip
import json
import os
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

BAD_KINDS = (
    "too_long", "blank_line", "not_utf8", "broken_json", "not_an_object", "missing_key", "null",
    "not_a_string", "empty", "tokenizer_error", "no_tokens", "id_out_of_range",
)  # fmt: skip
KEPT_OF_LONG_LINE_BYTES = 1000


class BadRecord(Exception):
    """A line that cannot become a document: `kind` is one of BAD_KINDS, `detail` says what is wrong."""

    def __init__(self, kind: str, detail: str):
        assert kind in BAD_KINDS, f"unknown kind of bad record: {kind}"
        super().__init__(f"{kind}: {detail}")
        self.kind, self.detail = kind, detail


def read_lines(path: str | Path, max_line_bytes: int) -> Iterator[tuple[int, bytes, bool]]:
    """Yields (line number from 1, line without its line end, whether it was longer than max_line_bytes).

    Of a line that is too long only the first KEPT_OF_LONG_LINE_BYTES are yielded and no more than
    max_line_bytes + 2 are held, so memory stays bounded whatever the file holds. Raises ValueError for
    damaged or cut gzip data.
    """
    number = 0
    with gzip.open(path) if str(path).endswith(".gz") else open(path, "rb") as file:
        try:
            while line := file.readline(max_line_bytes + 2):
                number += 1
                text = line.rstrip(b"\r\n")
                if len(text) <= max_line_bytes:
                    yield number, text, False
                    continue
                while not line.endswith(b"\n") and (line := file.readline(1 << 20)):
                    pass
                yield number, text[:KEPT_OF_LONG_LINE_BYTES], True
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise ValueError(
                f"{path}: damaged gzip data after line {number} ({error}); fetch the file again"
            ) from error


def parse_record(line: bytes, keys: Sequence[str]) -> list[str]:
    """The texts under `keys` of one JSON object, none of them only white space. Raises BadRecord."""
    if not line.strip():
        raise BadRecord("blank_line", "the line holds no record")
    try:
        record = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise BadRecord("not_utf8", f"byte {error.start + 1} of the line: {error.reason}") from error
    except (ValueError, RecursionError) as error:
        raise BadRecord("broken_json", str(error)) from error
    if not isinstance(record, dict):
        raise BadRecord("not_an_object", f"the record is a {type(record).__name__}, not an object")
    return [_text_under(key, record) for key in keys]


def _text_under(key: str, record: dict) -> str:
    if key not in record:
        raise BadRecord("missing_key", f"no key {key!r}; it has {', '.join(map(repr, list(record)[:8])) or 'none'}")
    text = record[key]
    if text is None:
        raise BadRecord("null", f"{key!r} is null")
    if not isinstance(text, str):
        raise BadRecord("not_a_string", f"{key!r} is a {type(text).__name__}")
    if not text.strip():
        raise BadRecord("empty", f"{key!r} is empty or only white space")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:  # "\ud800" is legal JSON and no character
        raise BadRecord("not_utf8", f"{key!r} holds half of a surrogate pair at character {error.start + 1}") from error
    return text


def check_inputs(paths: Sequence[str]) -> None:
    """Raises ValueError for an --input that is not a readable file."""
    for path in paths:
        if not os.path.isfile(path):
            raise ValueError(f"--input {path}: no such file; give the path of a file, not of a folder")
        if not os.access(path, os.R_OK):
            raise ValueError(f"--input {path}: not readable by this user; change its permissions")
