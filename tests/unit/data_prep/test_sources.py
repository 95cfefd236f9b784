"""Inputs cut into blocks: all of them is read once, in order, whatever the format, the blocks, the shards."""

import gzip
import math
import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hmoe_megatron.tools.data_prep import sources
from hmoe_megatron.tools.data_prep.records import Bad, Good, count_lines, parse_block
from hmoe_megatron.tools.data_prep.sources import Block, Span, find_sources, line_number, read_blocks, spans

pyarrow = pytest.importorskip("pyarrow")
import pyarrow.parquet as parquet  # noqa: E402

PARTS = [b"a", b"bb", b"\n", b"\n\n", b"\r\n", b"\r", b"\xff", b" "]
BYTES = st.lists(st.sampled_from(PARTS), max_size=60).map(b"".join)
ALL = 1 << 30


def write(folder, name: str, data: bytes):
    path = folder / name
    if name.endswith(".gz"):
        path.write_bytes(gzip.compress(data[: len(data) // 2]) + gzip.compress(data[len(data) // 2 :]))
    elif name.endswith(".zst"):
        half = len(data) // 2
        frames = b""
        for part in (data[:half], data[half:]):
            sink = pyarrow.BufferOutputStream()
            with pyarrow.CompressedOutputStream(sink, "zstd") as stream:
                stream.write(part)
            frames += sink.getvalue().to_pybytes()
        path.write_bytes(frames)
    else:
        path.write_bytes(data)
    return path


def read(span, max_bytes=ALL, start=None):
    return list(read_blocks(span, ["text"], max_bytes, start))


def records(blocks, kind, max_bytes=ALL):
    return [record for block in blocks for record in parse_block(block, kind, ["text"], max_bytes)]


def plain(record):
    """Without its line, which starts anew with each block."""
    return record._replace(line=0)


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.txt"])
@pytest.mark.parametrize("sample_by", ["line", "paragraph", "document"])
@given(data=BYTES, block_bytes=st.integers(1, 40), shards=st.integers(1, 5))
@settings(max_examples=40, deadline=None)
def test_shards_read_each_byte_once(name, sample_by, tmp_path_factory, data, block_bytes, shards):
    folder = tmp_path_factory.mktemp("in")
    inputs = find_sources([str(write(folder, name, data)), str(write(folder, "b" + name, data[::-1]))], sample_by)
    default, sources.BLOCK_BYTES = sources.BLOCK_BYTES, block_bytes
    try:
        parts = [span for number in range(shards) for span in spans(inputs, number, shards)]
        found = [block.data for span in parts for block in read(span)]
        blocks = read(Span(inputs[0], 0, None), 8)
        again = [read(Span(inputs[0], 0, None), 8, block.end) for block in blocks]
    finally:
        sources.BLOCK_BYTES = default
    assert b"".join(found) == data + data[::-1]
    kind = inputs[0].kind
    wanted = [plain(record) for record in records(blocks, kind, 8)]
    for number, rest in enumerate(again):  # what a run that was interrupted after any block goes on with
        done = records(blocks[: number + 1], kind, 8)
        assert list(map(plain, done + records(rest, kind, 8))) == wanted


@given(data=BYTES, block_bytes=st.integers(1, 40), max_bytes=st.integers(1, 12))
@settings(max_examples=200, deadline=None)
@pytest.mark.parametrize(("name", "sample_by"), [("a.jsonl", "line"), ("a.txt", "line"), ("a.txt", "paragraph")])
def test_records_do_not_depend_on_the_blocks(name, sample_by, tmp_path_factory, data, block_bytes, max_bytes):
    (source,) = find_sources([str(write(tmp_path_factory.mktemp("in"), name, data))], sample_by)
    whole = records(read(Span(source, 0, None), max_bytes), source.kind, max_bytes)
    default, sources.BLOCK_BYTES = sources.BLOCK_BYTES, block_bytes
    try:
        blocks = read(Span(source, 0, None), max_bytes)
    finally:
        sources.BLOCK_BYTES = default
    assert list(map(plain, records(blocks, source.kind, max_bytes))) == list(map(plain, whole))


@pytest.mark.parametrize("shards", [1, 2, 3, 7, 50])
def test_rows_of_parquet_are_read_once(shards, tmp_path):
    path = tmp_path / "a.parquet"
    texts = [None if number % 7 == 0 else f"row {number}" for number in range(500)]
    parquet.write_table(pyarrow.table({"n": list(range(500)), "text": texts}), path, row_group_size=90)
    inputs = find_sources([str(path)])
    rows = [
        row
        for number in range(shards)
        for span in spans(inputs, number, shards)
        for block in read(span)
        for row in block.data
    ]
    assert [text and text.decode() for (text,) in rows] == texts
    resumed = read(Span(inputs[0], 0, None), start=333)
    assert [row for block in resumed for row in block.data] == rows[333:]


def test_shards_are_even(tmp_path):
    paths = [str(write(tmp_path, f"{number}.jsonl", b"yyyy\n" * (200 * number + 2))) for number in range(4)]
    inputs = find_sources(paths)
    total = sum(source.bytes for source in inputs)
    for shards in (2, 3, 8):
        sizes = [sum(span.read_bytes for span in spans(inputs, number, shards)) for number in range(shards)]
        assert sum(sizes) == total and max(sizes) - min(sizes) <= 20


def test_a_long_record_is_held_in_pieces(tmp_path):
    path = write(tmp_path, "a.jsonl", b"x" * 10 + b"\n" + b"y" * 5_000_000 + b"\n" + b"z" * 11 + b"\r\n\n" + b"w" * 10)
    (source,) = find_sources([str(path)])
    blocks = read(Span(source, 0, None), 10)
    assert max(len(block.data) for block in blocks) <= 2 * sources.BLOCK_BYTES
    assert [block.is_cut for block in blocks] == [False, True, False, False]
    assert blocks[1].end == 11 + 5_000_001 and len(blocks[1].data) < 2000


@pytest.mark.parametrize("sample_by", ["line", "paragraph"])
def test_a_long_record_behind_white_space_is_one_and_its_line_is_right(sample_by, tmp_path):
    data = b"1\n\n" + b"\r\n" * 2000 + b"5\n" * 3 + b"6" * 4_000_000 + b"\n7\n\n8\n"
    if sample_by == "line":
        data = data.replace(b"5\n" * 3, b"\r" * 1500)
    (source,) = find_sources([str(write(tmp_path, "a.txt", data))], sample_by)
    line, found = 1, []
    for block in read(Span(source, 0, None), 1000):
        found += [(line + record.line, type(record).__name__) for record in parse_block(block, sample_by, ["t"], 1000)]
        line += count_lines(block, sample_by)
    long_line = data.split(b"\n").index(b"5" if sample_by == "paragraph" else b"\r" * 1500 + b"6" * 4_000_000) + 1
    after = [(len(data.split(b"\n")) - 1, "Good")]
    if sample_by == "line":
        after = [(long_line + 1, "Good"), *after]
    assert found == [(1, "Good"), (long_line, "Bad"), *after]


@pytest.mark.parametrize(
    ("name", "data"), [("a.jsonl", b"\n" * 100_000), ("a.txt", b"1\n\n" * 50_000), ("b.txt", b"\n" * 100_000 + b"x")]
)
def test_a_block_has_few_records(name, data, tmp_path):
    (source,) = find_sources([str(write(tmp_path, name, data))], "paragraph")
    blocks = read(Span(source, 0, None))
    assert b"".join(block.data for block in blocks) == data and blocks[-1].end == len(data)
    assert max(len(records([block], source.kind)) for block in blocks) <= sources.MAX_LINES


def test_a_block_has_few_rows(tmp_path):
    parquet.write_table(pyarrow.table({"text": pyarrow.nulls(100_000, pyarrow.string())}), tmp_path / "a.parquet")
    (source,) = find_sources([str(tmp_path / "a.parquet")])
    blocks = read(Span(source, 0, None))
    assert sum(len(block.data) for block in blocks) == 100_000
    assert max(len(block.data) for block in blocks) <= sources.MAX_LINES + sources.ROWS_AT_ONCE


def test_patterns_are_sorted_and_formats_follow_from_names(tmp_path):
    for name in ("b.jsonl", "a.json.gz", "c.parquet", "d.txt.zst", "e"):
        (tmp_path / name).write_bytes(b"x")
    found = find_sources([str(tmp_path / "e"), str(tmp_path / "*.*")], "paragraph")
    names = [os.path.basename(source.path) for source in found]
    assert names == ["e", "a.json.gz", "b.jsonl", "c.parquet", "d.txt.zst"]
    assert [source.kind for source in found] == ["paragraph", "json", "json", "parquet", "paragraph"]
    assert [source.compression for source in found] == [None, "gzip", None, None, "zstd"]


def test_capitals_count_as_small_letters(tmp_path):
    for name in ("a.JSONL", "b.Parquet", "c.jsonl.GZ", "d.TXT.Zst"):
        (tmp_path / name).write_bytes(b"x")
    found = find_sources([str(tmp_path / "*")])
    assert [(source.kind, source.compression) for source in found] == [
        ("json", None),
        ("parquet", None),
        ("json", "gzip"),
        ("document", "zstd"),
    ]


@pytest.mark.parametrize("name", ["a.jsonl.bz2", "a.XZ", "a.tar.gz", "a.zip", "a.tgz"])
def test_a_compression_that_is_not_read_is_named(name, tmp_path):
    (tmp_path / name).write_bytes(b"any")
    with pytest.raises(ValueError, match=rf"{name}: \.\w+ is not read; unpack the file"):
        find_sources([str(tmp_path / name)])


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst", "a.txt.GZ", "a.parquet"])
def test_a_compressed_file_of_no_bytes_is_a_download_that_was_cut(name, tmp_path):
    (tmp_path / name).touch()
    (tmp_path / "good.jsonl").write_text('{"text": "a"}')
    with pytest.raises(ValueError, match=rf"{name}: holds 0 bytes, a download that was cut short"):
        find_sources([str(tmp_path / "good.jsonl"), str(tmp_path / name)])


def test_a_window_that_is_too_large_is_no_damage(tmp_path):
    path, text = tmp_path / "a.txt.zst", b"some text"
    header = b"\x28\xb5\x2f\xfd\x00\xa8"  # a frame of window 2^31, its size not said
    path.write_bytes(header + (len(text) << 3 | 1).to_bytes(3, "little") + text)
    with pytest.raises(ValueError, match=r"a\.txt\.zst: .*window above 128 MB.*zstd -d --long=31"):
        for span in spans(find_sources([str(path)])):
            read(span)


@pytest.mark.parametrize(
    ("name", "message"), [("a.jsonl.gz", "damaged or cut gzip"), ("a.jsonl.zst", "zst"), ("a.parquet", "parquet")]
)
@pytest.mark.parametrize("damage", ["cut", "garbage"])
def test_damaged_files_are_named(name, message, damage, tmp_path):
    path = tmp_path / name
    if name.endswith("parquet"):
        parquet.write_table(pyarrow.table({"text": ["a"] * 1000}), path)
    else:
        write(tmp_path, name, os.urandom(20_000))
    data = path.read_bytes()
    path.write_bytes(data[: len(data) - 9] if damage == "cut" else b"garbage" * 100)
    with pytest.raises(ValueError, match=rf"{name}: .*{message}.*fetch the file again"):
        for span in spans(find_sources([str(path)])):
            read(span)


def test_columns_are_checked_before_work(tmp_path):
    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"text": [1, 2], "other": ["a", "b"]}), path)
    (source,) = find_sources([str(path)])
    with pytest.raises(ValueError, match="column 'text' holds int64"):
        list(read_blocks(Span(source, 0, None), ["text"], ALL))
    twice = pyarrow.Table.from_arrays([pyarrow.array(["a"]), pyarrow.array(["b"])], names=["text", "text"])
    parquet.write_table(twice, tmp_path / "b.parquet")
    with pytest.raises(ValueError, match="has 2 columns 'text'"):
        read(Span(*find_sources([str(tmp_path / "b.parquet")]), 0, None))
    with pytest.raises(ValueError, match="no column 'body'; it has text, other"):
        list(read_blocks(Span(source, 0, None), ["body"], ALL))


def test_line_numbers_are_counted(tmp_path):
    data = b"".join(b"%d\n" % number for number in range(1000))
    (source,) = find_sources([str(write(tmp_path, "a.jsonl", data))])
    for span in (span for number in range(7) for span in spans([source], number, 7)):
        first = data[span.start :].split(b"\n")[0]
        assert line_number(source, span.start) == int(first) + 1
    assert math.prod(span.start for span in spans([source], 3, 7))


def test_a_record_of_just_the_most_bytes_is_kept():
    line = b'{"text": "abc"}'
    for most, kind in ((len(line), Good), (len(line) - 1, Bad)):
        (found,) = parse_block(Block(line, len(line), len(line)), "json", ["text"], most)
        assert isinstance(found, kind), most
