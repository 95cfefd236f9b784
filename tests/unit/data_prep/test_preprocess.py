"""Text to Megatron's data sets: every document, in order, read back by Megatron; every bad record accounted for."""

import gzip
import hashlib
import json
import os

import pytest
import sentencepiece
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hmoe_megatron.tools.data_prep import encoding
from hmoe_megatron.tools.data_prep.index import write_index
from hmoe_megatron.tools.data_prep.records import BadRecord, parse_record
from hmoe_megatron.tools.data_prep.runs import megatron_tokenizer_args
from tests.unit.data_prep.calls import (
    EOD_ID,
    SP_VOCAB_SIZE,
    argv_of,
    contents,
    left_in,
    make_texts,
    preprocess,
    preprocess_data,
    read_data_set,
    write_jsonl,
)


def test_data_set_gives_the_text_back(sp_model, tmp_path):
    texts = [*make_texts(60), "ünï 😀\u2028\n", "<s> </s>"]
    first = write_jsonl(tmp_path / "a.jsonl", texts[:40])
    with gzip.open(tmp_path / "b.jsonl.gz", "wb") as file:
        file.write(write_jsonl(tmp_path / "b.jsonl", texts[40:]).read_bytes().rstrip(b"\n"))
    second = tmp_path / "b.jsonl.gz"
    assert preprocess(first, second, prefix=tmp_path / "out", model=sp_model, flags=("--append-eod",)) == 0
    documents = read_data_set(tmp_path / "out")
    tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(sp_model))
    assert [ids[-1] for ids in documents] == [EOD_ID] * len(texts)
    assert [tokenizer.decode(ids[:-1]) for ids in documents] == texts
    assert left_in(tmp_path) == [f"out_text_document.{suffix}" for suffix in ("bin", "idx", "json")]

    sidecar = json.loads((tmp_path / "out_text_document.json").read_text())
    for name, facts in sidecar["outputs"].items():
        data = (tmp_path / name).read_bytes()
        assert facts == {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    for facts, path in zip(sidecar["request"]["inputs"], (first, second), strict=True):
        assert facts["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
        assert facts["bytes"] == path.stat().st_size
    hashes = sidecar["request"]["tokenizer"]["sha256"]
    assert hashes == {"tok.model": hashlib.sha256(sp_model.read_bytes()).hexdigest()}
    assert sidecar["counts"] == {"records": 62, "documents": 62, "tokens": sum(map(len, documents)), "bad_records": {}}
    assert (sidecar["dtype"], sidecar["vocab_size"], sidecar["eod_id"]) == ("uint16", SP_VOCAB_SIZE, EOD_ID)


@given(
    texts=st.lists(
        st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\u2581")).filter(str.strip),
        min_size=1,
        max_size=8,
    )
)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_text_comes_back(texts, sp_model, bpe_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("any")
    corpus = write_jsonl(folder / "a.jsonl", texts)
    for name, model in (("sp", sp_model), ("bpe", bpe_folder)):
        assert preprocess(corpus, prefix=folder / name, model=model) == 0
        args, rest = preprocess_data.parse_flags(argv_of(corpus, prefix="y", model=model))
        tokenizer = encoding.Encoder(megatron_tokenizer_args(args, rest), ["text"], False, 1 << 20, None).tokenizer
        assert [tokenizer.detokenize(ids) for ids in read_data_set(folder / name)] == texts


@given(data=st.binary(max_size=300))
@settings(max_examples=60, deadline=None)
def test_any_bytes_are_accounted_for(data, tmp_path_factory):
    """Whatever the input holds, each line is a document or a counted bad record, and the quarantine gives it back."""
    folder = tmp_path_factory.mktemp("any")
    corpus = folder / "a.jsonl"
    corpus.write_bytes(b'{"text": "1 2"}\n' + data + b'\n{"text": "3"}\n')
    assert preprocess(corpus, prefix=folder / "out", flags=("--on-bad-record", "quarantine")) == 0
    counts = json.loads((folder / "out_text_document.json").read_text())["counts"]
    lines = corpus.read_bytes().split(b"\n")[:-1]
    assert counts["records"] == len(lines) == counts["documents"] + sum(counts["bad_records"].values())
    assert len(read_data_set(folder / "out")) == counts["documents"] >= 2
    quarantine = folder / "out.quarantine.jsonl"
    kept = list(map(json.loads, quarantine.read_text().splitlines())) if quarantine.exists() else []
    assert len(kept) == sum(counts["bad_records"].values())
    for record in kept:
        assert record["raw"].encode("utf-8", "surrogateescape") == lines[record["line"] - 1]


@pytest.mark.parametrize("model", ["sp_model", "bpe_folder"])
def test_bytes_do_not_depend_on_workers_nor_on_the_way(model, tmp_path, small_blocks, request):
    corpus = write_jsonl(tmp_path / "a.jsonl", make_texts(400))
    found = []
    for number, flags in enumerate([(), ("--workers", "2"), ("--workers", "3"), ("--stock-tokenizer",)]):
        prefix = tmp_path / str(number) / "out"
        prefix.parent.mkdir()
        model_path = request.getfixturevalue(model)
        assert preprocess(corpus, prefix=prefix, model=model_path, flags=("--append-eod", *flags)) == 0
        found.append(contents(prefix.parent))
    assert len(found[0]) == 3
    way = json.loads(found[-1].pop("out_text_document.json"))["tokenizer_way"]
    assert way == "Megatron's tokenizer, text by text"
    assert all(files == {name: found[0][name] for name in files} for files in found)


def test_the_files_are_those_of_megatrons_own_builder(bpe_folder, tmp_path):
    """A loop of Megatron's tokenizer and builder, as its users write it."""
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    texts = make_texts(100)
    corpus = write_jsonl(tmp_path / "a.jsonl", texts)
    assert preprocess(corpus, prefix=tmp_path / "out", model=bpe_folder, flags=("--append-eod",)) == 0
    args, rest = preprocess_data.parse_flags(argv_of(corpus, prefix="y", model=bpe_folder))
    tokenizer = encoding.Encoder(megatron_tokenizer_args(args, rest), ["text"], False, 1 << 20, None).tokenizer
    builder = IndexedDatasetBuilder(str(tmp_path / "own.bin"), dtype=DType.optimal_dtype(tokenizer.vocab_size))
    for text in texts:
        ids = [*tokenizer.tokenize(text), tokenizer.eod]
        builder.add_document(ids, [len(ids)])
    builder.finalize(str(tmp_path / "own.idx"))
    for suffix in ("bin", "idx"):
        assert (tmp_path / f"out_text_document.{suffix}").read_bytes() == (tmp_path / f"own.{suffix}").read_bytes()


def test_the_index_is_written_in_pieces(tmp_path, monkeypatch):
    import numpy as np
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    lengths = np.random.default_rng(0).integers(1, 50, 1000)
    builder = IndexedDatasetBuilder(str(tmp_path / "own.bin"), dtype=np.int32)
    for length in lengths:
        builder.add_document(range(length), [length])
    builder.finalize(str(tmp_path / "own.idx"))
    parts = [tmp_path / str(number) for number in range(3)]
    for path, part in zip(parts, (lengths[:0], lengths[:333], lengths[333:]), strict=True):
        path.write_bytes(part.astype(np.int32).tobytes())
    monkeypatch.setattr("hmoe_megatron.tools.data_prep.index.PIECE", 64)
    assert write_index(tmp_path / "new.idx", parts, np.int32) == (1000, lengths.sum())
    assert (tmp_path / "new.idx").read_bytes() == (tmp_path / "own.idx").read_bytes()


def test_megatrons_datasets_read_it(sp_model, tmp_path):
    from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig

    corpus = write_jsonl(tmp_path / "a.jsonl", make_texts(80))
    assert preprocess(corpus, prefix=tmp_path / "out", model=sp_model, flags=("--append-eod",)) == 0
    args, rest = preprocess_data.parse_flags(argv_of(corpus, prefix="y", model=sp_model))
    encoder = encoding.Encoder(megatron_tokenizer_args(args, rest), ["text"], False, 1 << 20, None)
    config = GPTDatasetConfig(
        random_seed=1,
        sequence_length=32,
        blend=([str(tmp_path / "out_text_document")], None),
        split="1,0,0",
        path_to_cache=str(tmp_path / "cache"),
        tokenizer=encoder.tokenizer,
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
    )
    train, *_ = BlendedMegatronDatasetBuilder(GPTDataset, [20, 0, 0], lambda: True, config).build()
    stream = [id for ids in read_data_set(tmp_path / "out") for id in ids]
    assert len(train) >= 20
    for number in range(20):
        tokens = train[number]["tokens"].tolist()
        assert len(tokens) == 32 and set(tokens) <= set(stream)


def test_other_formats_give_the_same_documents(sp_model, tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    texts = [text.strip() for text in make_texts(40)]
    inputs = {"a.jsonl": write_jsonl(tmp_path / "a.jsonl", texts)}
    with pyarrow.output_stream(tmp_path / "a.jsonl.zst", compression="zstd") as file:
        file.write(inputs["a.jsonl"].read_bytes())
    parquet.write_table(pyarrow.table({"text": texts, "n": list(range(40))}), tmp_path / "a.parquet", row_group_size=7)
    (tmp_path / "a.txt").write_text("\n\n\n".join(texts) + "\n")
    for number, text in enumerate(texts):
        (tmp_path / f"{number:03}.text").write_text(text)
    sources = ["a.jsonl", "a.jsonl.zst", "a.parquet", "a.txt", "*.text"]
    found = []
    for number, name in enumerate(sources):
        flags = ("--sample-by", "paragraph") if name == "a.txt" else ()
        assert preprocess(tmp_path / name, prefix=tmp_path / f"out{number}", model=sp_model, flags=flags) == 0
        found.append(read_data_set(tmp_path / f"out{number}"))
    assert len(found[0]) == 40 and all(documents == found[0] for documents in found)


BAD_LINES = {
    "too_long": b'{"text": "' + b"1 " * 200 + b'1"}',
    "blank_line": b"  \t",
    "not_utf8": b'{"text": "\xff1"}',
    "broken_json": b'{"text": "1 2',
    "not_an_object": b'["1 2"]',
    "missing_key": b'{"txt": "1 2"}',
    "null": b'{"text": null}',
    "not_a_string": b'{"text": 12}',
    "empty": b'{"text": " \\n"}',
    "tokenizer_error": b'{"text": "one two"}',
    "id_out_of_range": b'{"text": "1 100"}',
}
OTHER_BAD_LINES = [
    (b'{"text": "\\ud800"}', "not_utf8"),
    (b'{"text": ""}', "empty"),
    (b"", "blank_line"),
    (b"[" * 150_000, "too_long"),
    (b"[" * 300, "broken_json"),
    (b'{"text": "1 -1"}', "id_out_of_range"),
    (b'{"text": "70000"}', "id_out_of_range"),
    (b'{"text": "1"} {"text": "2"}', "broken_json"),
    (b'{"text": 1' + b"0" * 300 + b"}", "not_a_string"),
]


@pytest.mark.parametrize("workers", ["1", "2"])
@pytest.mark.parametrize("position", [0, 2, 4])
def test_bad_records_everywhere_under_every_policy(position, workers, tmp_path, capsys):
    good = [b'{"text": "%d 5"}' % n for n in range(4)]
    cases = [(line, kind) for kind, line in BAD_LINES.items()]
    if workers == "1":
        cases += OTHER_BAD_LINES
    else:
        cases = cases[:1] + cases[-1:]
    for number, (line, kind) in enumerate(cases):
        lines = [*good[:position], line, *good[position:]]
        folder = tmp_path / str(number)
        folder.mkdir()
        corpus = folder / "in.jsonl"
        corpus.write_bytes(b"\n".join(lines) + b"\n")
        flags = ("--max-doc-bytes", "400", "--workers", workers)

        assert preprocess(corpus, prefix=folder / "out", flags=flags) == 2
        error = capsys.readouterr().err
        assert f"in.jsonl:{position + 1}: {kind}: " in error and error.count("\n") == 1
        assert left_in(folder) == [".out.partial"]

        skip = (*flags, "--on-bad-record", "skip")  # goes on with what is there
        assert preprocess(corpus, prefix=folder / "out", flags=skip) == 0
        assert f"bad records: {kind} 1" in capsys.readouterr().out
        assert read_data_set(folder / "out") == [[n, 5] for n in range(4)]
        counts = json.loads((folder / "out_text_document.json").read_text())["counts"]
        assert counts == {"records": 5, "documents": 4, "tokens": 8, "bad_records": {kind: 1}}

        quarantine = (*flags, "--on-bad-record", "quarantine", "--max-bad-records", "1")
        assert preprocess(corpus, prefix=folder / "out2", flags=quarantine) == 0
        (record,) = map(json.loads, (folder / "out2.quarantine.jsonl").read_text().splitlines())
        assert (record["file"], record["line"], record["reason"]) == (str(corpus), position + 1, kind)
        raw = record["raw"].encode("utf-8", "surrogateescape")
        assert raw and line.startswith(raw) if kind == "too_long" else raw == line
        assert (folder / "out2_text_document.bin").read_bytes() == (folder / "out_text_document.bin").read_bytes()
        capsys.readouterr()


def test_every_kind_of_bad_record_is_counted(tmp_path, capsys):
    corpus = tmp_path / "in.jsonl"
    corpus.write_bytes(b"\n".join([*BAD_LINES.values(), b'{"text": "1"}', *BAD_LINES.values()]))
    flags = ("--max-doc-bytes", "400", "--on-bad-record", "skip")
    assert preprocess(corpus, prefix=tmp_path / "out", flags=flags) == 0
    counts = json.loads((tmp_path / "out_text_document.json").read_text())["counts"]
    assert counts["bad_records"] == dict.fromkeys(sorted(BAD_LINES), 2)
    assert counts["records"] == counts["documents"] + 2 * len(BAD_LINES) == 23

    limit = (*flags, "--max-bad-records", "21")
    assert preprocess(corpus, prefix=tmp_path / "limited", flags=limit) == 2
    error = capsys.readouterr().err
    assert "one more than --max-bad-records 21" in error and "in.jsonl:23:" in error
    assert left_in(tmp_path, "limited") == [".limited.partial"]


def test_bad_rows_of_parquet_are_kept_as_objects(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    rows = pyarrow.table({"a": ["1", None, " ", "4"], "b": pyarrow.array([b"2", b"3", b"3", b"\xff"])})
    parquet.write_table(rows, tmp_path / "in.parquet")
    flags = ("--json-keys", "a", "b", "--on-bad-record", "quarantine")
    assert preprocess(tmp_path / "in.parquet", prefix=tmp_path / "out", flags=flags) == 0
    assert (read_data_set(tmp_path / "out", "a"), read_data_set(tmp_path / "out", "b")) == ([[1]], [[2]])
    kept = list(map(json.loads, (tmp_path / "out.quarantine.jsonl").read_text().splitlines()))
    assert [(record["line"], record["reason"]) for record in kept] == [(2, "null"), (3, "empty"), (4, "not_utf8")]
    assert json.loads(kept[0]["raw"]) == {"a": None, "b": "3"}


def test_text_that_is_no_document_is_accounted_for(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"")
    (tmp_path / "b.txt").write_bytes(b"1 2\n")
    (tmp_path / "c.txt").write_bytes(b"1 " * 300)
    flags = ("--on-bad-record", "quarantine", "--max-doc-bytes", "400")
    assert preprocess(tmp_path / "*.txt", prefix=tmp_path / "out", flags=flags) == 0
    assert read_data_set(tmp_path / "out") == [[1, 2]]
    counts = json.loads((tmp_path / "out_text_document.json").read_text())["counts"]
    assert counts["bad_records"] == {"empty": 1, "too_long": 1}


def test_several_keys_make_several_data_sets_of_the_same_documents(tmp_path):
    corpus = tmp_path / "in.jsonl"
    corpus.write_text('{"a": "1 2", "b": "3"}\n{"a": "1"}\n{"a": "4", "b": "5 6"}\n')
    flags = ("--json-keys", "a", "b", "--on-bad-record", "skip", "--append-eod")
    assert preprocess(corpus, prefix=tmp_path / "out", flags=flags) == 0
    assert read_data_set(tmp_path / "out", "a") == [[1, 2, 99], [4, 99]]
    assert read_data_set(tmp_path / "out", "b") == [[3, 99], [5, 6, 99]]
    assert json.loads((tmp_path / "out_b_document.json").read_text())["counts"]["tokens"] == 5


def test_a_byte_order_mark_is_no_text(tmp_path):
    corpus = tmp_path / "in.jsonl"
    corpus.write_bytes(b'\xef\xbb\xbf{"text": "1 2"}\r\n{"text": "3"}\r\n')
    assert preprocess(corpus, prefix=tmp_path / "out") == 0
    assert read_data_set(tmp_path / "out") == [[1, 2], [3]]


def test_the_same_command_does_nothing_and_another_is_refused(tmp_path, capsys):
    corpus = tmp_path / "in.jsonl"
    corpus.write_text('{"text": "1 2"}\n')
    idx = tmp_path / "out_text_document.idx"
    assert preprocess(corpus, prefix=tmp_path / "out") == 0
    before = idx.stat().st_mtime_ns
    os.utime(corpus)  # copied again: the same bytes at another time
    assert preprocess(corpus, prefix=tmp_path / "out", flags=("--workers", "2")) == 0
    assert "nothing done" in capsys.readouterr().out and idx.stat().st_mtime_ns == before
    content = idx.read_bytes()
    assert preprocess(corpus, prefix=tmp_path / "out", flags=("--append-eod",)) == 2
    assert "remove it or choose another prefix" in capsys.readouterr().err
    idx.write_bytes(content[:-1])
    assert preprocess(corpus, prefix=tmp_path / "out") == 2
    assert "damaged" in capsys.readouterr().err
    idx.unlink()  # without it there is no data set, so it is made again
    assert preprocess(corpus, prefix=tmp_path / "out") == 0
    assert idx.read_bytes() == content


def test_damaged_gzip_stops_whatever_the_policy(tmp_path, capsys):
    path = tmp_path / "in.jsonl.gz"
    data = gzip.compress(b'{"text": "1"}\n' * 10_000)
    for number, damaged in enumerate((data[:-20], b"not gzip at all")):
        path.write_bytes(damaged)
        assert preprocess(path, prefix=tmp_path / f"out{number}", flags=("--on-bad-record", "skip")) == 2
        assert "damaged or cut gzip data" in capsys.readouterr().err
        assert not any(name.startswith("out") for name in left_in(tmp_path))


def test_deep_nesting_is_broken_json_and_no_crash():
    with pytest.raises(BadRecord, match="broken_json"):
        parse_record(b"[" * 200_000, ["text"])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--workers", "0"], "--workers 0: give 1 or more"),
        (["--max-doc-bytes", "0"], "--max-doc-bytes 0"),
        (["--max-doc-bytes", str(2**31)], f"--max-doc-bytes {2**31}"),
        (["--max-bad-records", "3"], "stop allows none"),
        (["--on-bad-record", "skip", "--max-bad-records", "-1"], "--max-bad-records -1"),
        (["--json-keys", "a", "a"], "--json-keys a a"),
        (["--json-keys", "../a"], "--json-keys ../a"),
        (["--input", __file__, "--json-keys", "a", "b"], "is plain text and has no keys"),
        (["--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", "none.model"], "none.model"),
        (["--output-prefix", "/dev/null/out"], "--output-prefix /dev/null/out: /dev/null is no directory"),
        (["--tokenizer-type", "SentencePiece"], "--tokenizer-type SentencePiece: no such type"),
        (["--input", "/dev/null"], "/dev/null"),
        (["--input", "/none.jsonl"], "--input /none.jsonl: no such file"),
        (["--input", "/none/*.jsonl"], "--input /none/*.jsonl: no such file"),
        (["--input", "/tmp"], "not of a folder"),
        (["--null-tokenizer-eod-id", "100", "--append-eod"], "end-of-document id 100"),
        (["--merge", "1"], "--merge 1: give the number of shards"),
        (["--merge", "3"], "--merge 3: nothing is there of --shard 0/3, 1/3, 2/3: run it first"),
        (["--merge", "3", "--shard", "0/3"], "--shard and --merge"),
    ],
)
def test_preprocess_refusals(flags, message, tmp_path, capsys):
    corpus = tmp_path / "in.jsonl"
    corpus.write_text('{"text": "1"}\n')
    assert preprocess(corpus, prefix=tmp_path / "out", flags=flags) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert left_in(tmp_path) in ([], [".out.partial"])


@pytest.mark.parametrize("word", ["3/3", "1", "0/1", "a/b", "0/100000"])
def test_shards_are_numbered_from_0(word, tmp_path, capsys):
    with pytest.raises(SystemExit):
        preprocess(tmp_path, prefix=tmp_path / "out", flags=("--shard", word))
    assert "give number/shards" in capsys.readouterr().err


def test_a_run_that_keeps_no_document_is_refused(tmp_path, capsys):
    corpus = tmp_path / "in.jsonl"
    for number, (content, message) in enumerate(((b"", "holds 0 bytes"), (b"\n\n", "blank_line 2"))):
        corpus.write_bytes(content)
        assert preprocess(corpus, prefix=tmp_path / f"out{number}", flags=("--on-bad-record", "skip")) == 2
        assert message in capsys.readouterr().err
        assert left_in(tmp_path, f"out{number}") == ([f".out{number}.partial"] if content else [])


def test_flags_of_neither_tool_nor_megatron_are_refused(tmp_path, capsys):
    corpus = tmp_path / "in.jsonl"
    corpus.write_text('{"text": "1"}\n')
    with pytest.raises(SystemExit) as stop:
        preprocess(corpus, prefix=tmp_path / "out", flags=("--no-such-flag",))
    assert stop.value.code == 2 and "--no-such-flag" in capsys.readouterr().err


def test_megatron_loads_the_tokenizer_and_its_special_ids(sp_model):
    args, rest = preprocess_data.parse_flags(argv_of("x", prefix="y", model=sp_model))
    encoder = encoding.Encoder(megatron_tokenizer_args(args, rest), ["text"], True, 1 << 20, None)
    tokenizer = encoder.tokenizer
    assert (tokenizer.unk, tokenizer.bos, tokenizer.eod, tokenizer.pad) == (0, 1, EOD_ID, 3)
    assert tokenizer.vocab_size == SP_VOCAB_SIZE
    text = " two  spaces\n\nand lines "
    assert tokenizer.detokenize(tokenizer.tokenize(text)) == text


def test_the_benchmarks_stock_way_makes_the_same_files(bpe_folder, tmp_path):
    from benchmarks import stock_preprocess
    from benchmarks.data import Run, table

    corpus = write_jsonl(tmp_path / "a.jsonl", make_texts(200))
    assert preprocess(corpus, prefix=tmp_path / "out", model=bpe_folder, flags=("--append-eod",)) == 0
    stock_preprocess.main(str(corpus), str(tmp_path / "stock"), "HuggingFaceTokenizer", str(bpe_folder), 2)
    for suffix in ("bin", "idx"):
        assert (tmp_path / f"out_text_document.{suffix}").read_bytes() == (tmp_path / f"stock.{suffix}").read_bytes()
    runs = [Run("this tool", 1, 2.0, 1.0, 10.0, 4_000_000, ""), Run("Megatron's way", 1, 10.0, 9.0, 9.0, 4_000_000, "")]
    rows = table(runs, {"this tool": 1.0, "Megatron's way": 2.0}).splitlines()
    assert rows[2] == "| this tool | 1 | 2.0 | 2.00 | 1.0 | 10 | 5.00 | 4.00 | 8.00 |"
    assert rows[3] == "| Megatron's way | 1 | 10.0 | 0.40 | 9.0 | 9 | 1.00 | 0.50 | 1.00 |"
