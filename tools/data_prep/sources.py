"""The inputs of the data tools, read in order, in bounded blocks: JSON lines, plain text, Parquet. Imports no torch.

A format follows from the file's name: .parquet; .jsonl, .ndjson, .json: a record a line; everything
else is plain text. Plain files may end in .gz or .zst. Capitals count as small letters.
"""

import glob
import gzip
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

BLOCK_BYTES = 1 << 20
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
NOT_READ = (".bz2", ".xz", ".lzma", ".lz4", ".br", ".z", ".zip", ".7z", ".rar", ".tar", ".tgz", ".zstd", ".gzip")
JSON_SUFFIXES = (".jsonl", ".ndjson", ".json")
SAMPLE_BY = ("document", "paragraph", "line")
SEPARATORS = {"json": (b"\n",), "line": (b"\n",), "paragraph": (b"\n\n", b"\n\r\n"), "document": ()}
MAX_LINES = 1 << 14  # of a block
ROW_BYTES = BLOCK_BYTES // MAX_LINES  # what a row counts at least
ROWS_AT_ONCE = 16  # of Parquet, decoded together: a row may be long
LONGEST_SEPARATOR = 3
KEPT_OF_LONG_RECORD_BYTES = 1000


@dataclass(frozen=True)
class Source:
    """An input file. kind: "json", "parquet" or one of SAMPLE_BY; compression: "gzip", "zstd" or None."""

    path: str
    kind: str
    compression: str | None
    bytes: int

    @property
    def is_splittable(self) -> bool:
        """Whether reading can begin in the middle of the file."""
        return self.kind == "parquet" or (self.compression is None and self.kind != "document")


class Span(NamedTuple):
    """Part of a file that is read: from `start` to `end` (None: its end), in bytes before compression, or in rows."""

    source: Source
    start: int
    end: int | None

    @property
    def read_bytes(self) -> int:
        """Of the file on the disk."""
        if self.source.kind == "parquet" or self.end is None:
            return self.source.bytes
        return self.end - self.start


class Block(NamedTuple):
    """Whole records that follow each other. data: bytes of whole lines; or rows, a tuple of bytes or None for each.

    end: where the next one begins, in bytes of the decompressed file, or rows. read_bytes: of the span so far, on the
    disk. is_cut: `data` is the start of one record that is too long, `line` where it begins, from 0 at the block, and
    `lines` how many the block has.
    """

    data: bytes | list
    end: int
    read_bytes: int
    is_cut: bool = False
    line: int = 0
    lines: int = 0


def find_sources(
    patterns: Sequence[str], sample_by: str = "document", made: Callable[[str], bool] = lambda _: False
) -> list[Source]:
    """The files of --input in the order given, those of a pattern sorted by name. made: which of a pattern are what
    this very command makes, and no input. Raises ValueError."""
    paths = []
    for pattern in patterns:
        found = [pattern]
        if not os.path.lexists(pattern):
            found = sorted(path for path in glob.glob(pattern, recursive=True) if not made(path))
        if not found:
            raise ValueError(f"--input {pattern}: no such file; give the path of a file or a pattern in quotes")
        paths += found
    return [_source(path, sample_by) for path in paths]


def _source(path: str, sample_by: str) -> Source:
    if not os.path.isfile(path):
        raise ValueError(f"--input {path}: no such file; give the path of a file, not of a folder")
    if not os.access(path, os.R_OK):
        raise ValueError(f"--input {path}: not readable by this user; change its permissions")
    name = Path(path.lower())
    compression = COMPRESSIONS.get(name.suffix)
    suffix = Path(name.stem).suffix if compression else name.suffix
    if suffix == ".parquet" and compression:
        raise ValueError(f"--input {path}: Parquet compresses itself; decompress the file first")
    if other := next((end for end in (name.suffix, suffix) if end in NOT_READ), None):
        raise ValueError(f"--input {path}: {other} is not read; unpack the file, or compress it as .gz or .zst")
    kind = "parquet" if suffix == ".parquet" else "json" if suffix in JSON_SUFFIXES else sample_by
    if (compression or kind == "parquet") and not os.path.getsize(path):
        raise ValueError(f"--input {path}: holds 0 bytes, a download that was cut short; fetch the file again")
    if kind == "parquet" or compression == "zstd":
        _pyarrow(path)
    return Source(path, kind, compression, os.path.getsize(path))


def _pyarrow(path: str):
    try:
        import pyarrow.parquet
    except ImportError:
        raise ValueError(f"--input {path}: needs pyarrow; pip install 'hmoe-megatron[data]'") from None
    return pyarrow


def spans(sources: Sequence[Source], shard: int = 0, shards: int = 1) -> list[Span]:
    """What shard number `shard` of `shards` reads; all shards in their order read all there is, each record once.

    Shards are equal parts of the inputs' bytes on disk. Files that can't be split belong to who has their first byte.
    """
    total = sum(source.bytes for source in sources)
    begin, end = (total * number // shards for number in (shard, shard + 1))
    found, offset = [], 0
    for source in sources:
        first, last = (min(max(edge - offset, 0), source.bytes) for edge in (begin, end))
        if not source.is_splittable:
            if begin <= offset < end or (shard == shards - 1 and offset == total):
                found.append(Span(source, 0, None))
        elif first < last:
            found.append(_split(source, first, last))
        offset += source.bytes
    return [span for span in found if span.start != span.end]


def _split(source: Source, first: int, last: int) -> Span:
    if source.kind == "parquet":
        with _readable(source):
            rows = _pyarrow(source.path).parquet.read_metadata(source.path).num_rows
        return Span(source, *(rows * edge // source.bytes for edge in (first, last)))
    return Span(source, _aligned(source, first), _aligned(source, last))


def _aligned(source: Source, offset: int) -> int:
    """Where the first record at or after this byte begins."""
    if offset in (0, source.bytes):
        return offset
    with open(source.path, "rb") as file:
        position, kept = max(offset - LONGEST_SEPARATOR, 0), b""
        file.seek(position)
        while data := file.read(BLOCK_BYTES):
            data = kept + data
            ends = [
                position + at + len(mark)
                for mark in SEPARATORS[source.kind]
                if (at := data.find(mark, max(offset - len(mark) - position, 0))) >= 0
            ]
            if ends:
                return min(ends)
            kept = data[-LONGEST_SEPARATOR:]
            position += len(data) - len(kept)
    return source.bytes


def line_number(source: Source, offset: int) -> int:
    """Number, from 1, of the line or row that begins at `offset`."""
    if source.kind == "parquet" or not offset:
        return offset + 1
    with open(source.path, "rb") as file:
        parts = (file.read(min(BLOCK_BYTES, offset - at)) for at in range(0, offset, BLOCK_BYTES))
        return 1 + sum(part.count(b"\n") for part in parts)


def read_blocks(span: Span, keys: Sequence[str], max_record_bytes: int, start: int | None = None) -> Iterator[Block]:
    """The records of `span`, from `start` (an `end` of a block) on. Holds about a block, or one record, at a time.

    Raises ValueError for a file that is damaged, cut short or has not the columns `keys`.
    """
    start = span.start if start is None else start
    with _readable(span.source):
        if span.source.kind == "parquet":
            yield from _read_rows(span, keys, max_record_bytes, start)
        else:
            yield from _read_text(span, max_record_bytes, start)


@contextmanager
def _readable(source: Source):
    try:
        yield
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{source.path}: damaged or cut gzip data ({error}); fetch the file again") from error
    except OSError as error:
        # pyarrow's ArrowInvalid is a ValueError and its input/output errors an OSError without a number
        if error.errno is not None or source.compression != "zstd" and source.kind != "parquet":
            raise
        said = str(error).strip().splitlines()[0]
        if "too much memory" in said:  # zstd's words for a window above 128 MB
            raise ValueError(
                f"{source.path}: was compressed with a window above 128 MB (zstd --long or --ultra); unpack it with "
                "zstd -d --long=31"
            ) from error
        raise ValueError(
            f"{source.path}: damaged or cut {source.compression or source.kind} data ({said}); fetch the file again"
        ) from error
    except (ValueError, KeyError) as error:
        if type(error).__module__ != "pyarrow.lib" and not isinstance(error, UnicodeDecodeError | KeyError):
            raise
        raise ValueError(
            f"{source.path}: no readable {source.kind} file "
            f"({str(error).strip().splitlines()[0]}); fetch the file again"
        ) from error


@contextmanager
def _open(source: Source) -> Iterator[tuple[BinaryIO, BinaryIO]]:
    """(the decompressed file, the file on the disk)."""
    with open(source.path, "rb") as raw:
        if source.compression == "gzip":
            with gzip.GzipFile(fileobj=raw) as file:
                yield file, raw
        elif source.compression == "zstd":
            pyarrow = _pyarrow(source.path)
            with pyarrow.CompressedInputStream(pyarrow.PythonFile(raw, "r"), "zstd") as file:
                yield file, raw
        else:
            yield raw, raw


def _read_text(span: Span, max_record_bytes: int, start: int) -> Iterator[Block]:
    kind = span.source.kind
    marks = SEPARATORS[kind]
    first = 0 if span.source.compression else span.start
    with _open(span.source) as (file, raw):
        _skip(file, start, span.source)
        position, kept, long = start, b"", None  # position: of `kept`, which no block holds yet
        while data := _read_more(file, position + len(kept), len(kept), span.end):
            data = kept + data
            if long is not None:  # the rest of a record that is too long
                ended = _first_end(data, marks)
                done = ended or len(data) - LONGEST_SEPARATOR
                long = long._replace(lines=long.lines + data.count(b"\n", 0, done))
                position += done
                data = data[done:]
                if not ended:
                    kept = data
                    continue
                yield long._replace(end=position, read_bytes=raw.tell() - first)
                long = None
            cut = _last_end(data, marks)
            for part in _parts(data, cut, marks):
                position += len(part)
                yield Block(part, position, raw.tell() - first)
            kept = data[cut:]
            record = kept.strip(b"\r\n") if kind == "paragraph" else kept
            if len(record) > max_record_bytes + LONGEST_SEPARATOR:
                before, done = kept.index(record), len(kept) - LONGEST_SEPARATOR
                long = Block(
                    record[:KEPT_OF_LONG_RECORD_BYTES],
                    0,
                    0,
                    True,
                    line=kept.count(b"\n", 0, before),
                    lines=kept.count(b"\n", 0, done),
                )
                position, kept = position + done, kept[done:]
        end, read = max(position + len(kept), 1), raw.tell() - first
        if long is not None:
            yield long._replace(end=end, read_bytes=read, lines=long.lines + kept.count(b"\n"))
        elif kept or (kind == "document" and position == 0):  # an empty file is an empty document
            yield Block(kept, end, read)


def _parts(data: bytes, end: int, marks: Sequence[bytes]) -> Iterator[bytes]:
    """data[:end], cut behind separators where it has more than MAX_LINES: each record becomes objects."""
    start = 0
    if data.count(b"\n", 0, end) > MAX_LINES:
        newlines = np.flatnonzero(np.frombuffer(data, np.uint8, end) == ord("\n"))
        for at in newlines[MAX_LINES - 1 :: MAX_LINES].tolist():
            ends = [
                found + len(mark)
                for mark in marks
                if (found := data.find(mark, max(at - len(mark) + 1, start), end)) >= 0
            ]
            if ends and start < min(ends) < end:
                yield data[start : min(ends)]
                start = min(ends)
    if start < end:
        yield data[start:end]


def _skip(file: BinaryIO, start: int, source: Source) -> None:
    if not source.compression:
        file.seek(start)
        return
    while start and (data := file.read(min(start, BLOCK_BYTES))):
        start -= len(data)


def _read_more(file: BinaryIO, position: int, kept_bytes: int, end: int | None) -> bytes:
    """As much as is kept of an unfinished record: so a long one is put together in linear time."""
    wanted = max(BLOCK_BYTES, kept_bytes)
    return file.read(wanted if end is None else min(wanted, end - position))


def _first_end(data: bytes, marks: Sequence[bytes]) -> int:
    return min((at + len(mark) for mark in marks if (at := data.find(mark)) >= 0), default=0)


def _last_end(data: bytes, marks: Sequence[bytes]) -> int:
    return max((at + len(mark) for mark in marks if (at := data.rfind(mark)) >= 0), default=0)


def _read_rows(span: Span, keys: Sequence[str], max_record_bytes: int, start: int) -> Iterator[Block]:
    pyarrow = _pyarrow(span.source.path)
    with pyarrow.parquet.ParquetFile(span.source.path) as file:
        _check_columns(span.source.path, file.schema_arrow, keys, pyarrow.types)
        number_of_rows = file.metadata.num_rows
        end = number_of_rows if span.end is None else span.end
        rows, size, row = [], 0, 0
        for group in range(file.num_row_groups):
            group_end = row + file.metadata.row_group(group).num_rows
            if group_end <= start or row >= end:
                row = group_end
                continue
            for batch in file.iter_batches(ROWS_AT_ONCE, [group], list(keys), use_threads=False):
                columns = [batch.column(key).cast(pyarrow.large_binary()).to_pylist() for key in keys]
                wanted = list(zip(*columns, strict=True))[max(start - row, 0) : max(end - row, 0)]
                row += len(batch)
                rows += wanted
                size += sum(ROW_BYTES + sum(len(text or b"") for text in texts) for texts in wanted)
                if size >= BLOCK_BYTES:
                    yield Block(rows, min(row, end), span.source.bytes * row // number_of_rows)
                    rows, size = [], 0
        if rows:
            yield Block(rows, end, span.source.bytes)


def _check_columns(path: str, schema, keys: Sequence[str], types) -> None:
    for key in keys:
        if schema.names.count(key) > 1:
            raise ValueError(f"{path}: has {schema.names.count(key)} columns {key!r}: give another --json-keys")
        if key not in schema.names:
            raise ValueError(f"{path}: no column {key!r}; it has {', '.join(schema.names[:12])}: give --json-keys")
        kind = schema.field(key).type
        kind = kind.value_type if types.is_dictionary(kind) else kind
        is_text = (
            types.is_string,
            types.is_large_string,
            types.is_string_view,
            types.is_binary,
            types.is_large_binary,
            types.is_null,
        )
        if not any(matches(kind) for matches in is_text):
            raise ValueError(f"{path}: column {key!r} holds {kind}, not text: give another --json-keys")
