"""The tools that train a tokenizer and make Megatron's data sets."""

import gzip
import hashlib
import json
import multiprocessing
import os
import random
import signal
import sys
import time
from pathlib import Path

import pytest
import sentencepiece

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools"))
import preprocess_data  # noqa: E402
import train_tokenizer  # noqa: E402

from hmoe_megatron.data_prep import encoding  # noqa: E402
from hmoe_megatron.data_prep.records import BadRecord, parse_record, read_lines  # noqa: E402
from hmoe_megatron.files import write_whole  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")  # pytest's threads are idle

EOD_ID = 2
SP_VOCAB_SIZE = 400


def make_texts(count: int, seed: int = 0) -> list[str]:
    rng = random.Random(seed)
    words = ["".join(rng.choices("abcdefghijklmnop", k=rng.randint(1, 7))) for _ in range(300)]
    texts = []
    for number in range(count):
        lines = [" ".join(rng.choices(words, k=rng.randint(1, 9))) for _ in range(rng.randint(1, 6))]
        texts.append(f"{number}\n  " + "\n".join(lines) + "\n")
    return texts


def write_jsonl(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


@pytest.fixture(scope="module")
def sp_model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    corpus = write_jsonl(folder / "train.jsonl", make_texts(300))
    argv = ["--input", str(corpus), "--vocab-size", str(SP_VOCAB_SIZE), "--output", str(folder / "tok")]
    assert train_tokenizer.main(argv) == 0
    return folder / "tok.model"


def preprocess(*inputs: Path, prefix: Path, model: Path | None = None, flags: tuple = ()) -> int:
    """Without a model the NullTokenizer: the text is its ids, "3 1 4", below 100."""
    kind = ["SentencePieceTokenizer", "--tokenizer-model", str(model)] if model else ["NullTokenizer"]
    null = [] if model else ["--vocab-size", "100"]
    argv = [
        "--input",
        *map(str, inputs),
        "--output-prefix",
        str(prefix),
        "--tokenizer-type",
        *kind,
        *flags,
        *null,
    ]
    return preprocess_data.main(argv)


def read_data_set(prefix: Path, key: str = "text") -> list[list[int]]:
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    data = IndexedDataset(f"{prefix}_{key}_document")
    assert data.document_indices.tolist() == list(range(len(data) + 1))
    return [data[i].tolist() for i in range(len(data))]


def left_in(folder: Path, prefix: str = "out") -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name.lstrip(".").startswith(prefix))


# ---- train_tokenizer ----


def test_tokenizer_gives_any_text_back(sp_model):
    tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(sp_model))
    rng = random.Random(1)
    ranges = ((0, 0x80), (0, 0x3000), (0, 0x110000))
    fixed = [
        "",
        " ",
        "\n",
        " a",
        "a ",
        "  a  b\n\n c\n",
        "\r\n\t\0",
        "<s></s><unk><pad><0x0A>",
        "☯ ⁇ \u2028\ufeff",
    ]
    drawn = ["".join(chr(rng.randrange(*rng.choice(ranges))) for _ in range(rng.randrange(30))) for _ in range(2000)]
    for text in fixed + make_texts(20, seed=5) + drawn:
        text = text.encode("utf-8", "ignore").decode().replace("\u2581", "")
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert all(id > train_tokenizer.PAD_ID for id in ids), "text can make no special id"
    assert tokenizer.decode(tokenizer.encode("a\u2581b")) == "a b"  # the documented exception


def test_tokenizer_is_deterministic_and_lists_its_vocabulary(sp_model, tmp_path):
    corpus = sp_model.with_name("train.jsonl")
    argv = ["--input", str(corpus), "--vocab-size", str(SP_VOCAB_SIZE), "--output", str(tmp_path / "other")]
    assert train_tokenizer.main(argv) == 0
    assert (tmp_path / "other.model").read_bytes() == sp_model.read_bytes()
    rows = (tmp_path / "other.vocab").read_text().split("\n")[:-1]
    assert [row.split("\t")[0] for row in rows[:5]] == ["<unk>", "<s>", "</s>", "<pad>", "<0x00>"]
    assert len(rows) == SP_VOCAB_SIZE
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other.model", "other.vocab"]


def test_tokenizer_reads_text_and_gzip_alike(tmp_path):
    text = "\n".join(make_texts(50))
    (tmp_path / "a.txt").write_text(text)
    with gzip.open(tmp_path / "b.txt.gz", "wt") as file:
        file.write(text)
    for name in ("a.txt", "b.txt.gz"):
        argv = ["--input", str(tmp_path / name), "--vocab-size", "300", "--output", str(tmp_path / name)]
        assert train_tokenizer.main(argv) == 0
    assert (tmp_path / "a.txt.model").read_bytes() == (tmp_path / "b.txt.gz.model").read_bytes()


def test_sample_is_bounded_seeded_in_order_and_uniform():
    texts = [f"{n:04}" for n in range(1000)]
    kept, seen = train_tokenizer.sample(iter(texts), 400, seed=3)
    assert seen == 1000 and len(kept) == 100 and kept == sorted(kept)
    assert train_tokenizer.sample(iter(texts), 400, seed=3)[0] == kept
    assert train_tokenizer.sample(iter(texts), 400, seed=4)[0] != kept
    assert train_tokenizer.sample(iter(texts), 10**6, seed=3)[0] == texts
    means = [sum(map(int, train_tokenizer.sample(iter(texts), 400, seed)[0])) / 100 for seed in range(50)]
    assert abs(sum(means) / 50 - 499.5) < 20  # standard error: 289 / sqrt(5000) = 4


@pytest.mark.parametrize(
    ("flags", "content", "message"),
    [
        (["--vocab-size", "200"], b'{"text": "a"}\n', "need 261 or more"),
        (["--vocab-size", "4000"], b'{"text": "a b"}\n', "smaller vocabulary or more text"),
        (["--vocab-size", "300"], b'{"text": "a"}\n{"text": 3}\n', "in.jsonl:2: not_a_string"),
        (["--vocab-size", "300"], b"", "no text"),
        (["--vocab-size", "300", "--max-train-bytes", "0"], b'{"text": "a"}\n', "positive"),
    ],
)
def test_tokenizer_refusals(flags, content, message, tmp_path, capsys):
    (tmp_path / "in.jsonl").write_bytes(content)
    argv = ["--input", str(tmp_path / "in.jsonl"), "--output", str(tmp_path / "tok"), *flags]
    assert train_tokenizer.main(argv) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]


# ---- preprocess_data ----


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
    assert sidecar["counts"] == {
        "lines": 62, "documents": 62, "tokens": sum(map(len, documents)), "bad_records": {}
    }  # fmt: skip
    assert (sidecar["dtype"], sidecar["vocab_size"], sidecar["eod_id"]) == ("uint16", SP_VOCAB_SIZE, EOD_ID)


def test_bytes_do_not_depend_on_workers(sp_model, tmp_path, monkeypatch):
    monkeypatch.setattr(encoding, "CHUNK_BYTES", 500)
    corpus = write_jsonl(tmp_path / "a.jsonl", make_texts(400))
    contents = []
    for workers in (1, 2, 3):
        prefix = tmp_path / str(workers) / "out"
        prefix.parent.mkdir()
        assert preprocess(corpus, prefix=prefix, model=sp_model, flags=("--workers", str(workers))) == 0
        contents.append({path.name: path.read_bytes() for path in prefix.parent.iterdir()})
    assert len(contents[0]) == 3
    assert contents[0] == contents[1] == contents[2]


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
    (b'{"text": "' + b"9" * 100 + b'"}', "id_out_of_range"),
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
        assert left_in(folder) == []

        skip = (*flags, "--on-bad-record", "skip")
        assert preprocess(corpus, prefix=folder / "out", flags=skip) == 0
        assert f"bad records: {kind} 1" in capsys.readouterr().out
        assert read_data_set(folder / "out") == [[n, 5] for n in range(4)]
        counts = json.loads((folder / "out_text_document.json").read_text())["counts"]
        assert counts == {"lines": 5, "documents": 4, "tokens": 8, "bad_records": {kind: 1}}

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
    assert counts["lines"] == counts["documents"] + 2 * len(BAD_LINES) == 23

    limit = (*flags, "--max-bad-records", "21")
    assert preprocess(corpus, prefix=tmp_path / "limited", flags=limit) == 2
    assert "one more than --max-bad-records 21" in capsys.readouterr().err
    assert left_in(tmp_path, "limited") == []


def test_several_keys_make_several_data_sets_of_the_same_documents(tmp_path):
    corpus = tmp_path / "in.jsonl"
    corpus.write_text('{"a": "1 2", "b": "3"}\n{"a": "1"}\n{"a": "4", "b": "5 6"}\n')
    flags = ("--json-keys", "a", "b", "--on-bad-record", "skip", "--append-eod")
    assert preprocess(corpus, prefix=tmp_path / "out", flags=flags) == 0
    assert read_data_set(tmp_path / "out", "a") == [[1, 2, 99], [4, 99]]
    assert read_data_set(tmp_path / "out", "b") == [[3, 99], [5, 6, 99]]
    assert json.loads((tmp_path / "out_b_document.json").read_text())["counts"]["tokens"] == 5


def test_the_same_command_does_nothing_and_another_is_refused(tmp_path, capsys):
    corpus = tmp_path / "in.jsonl"
    corpus.write_text('{"text": "1 2"}\n')
    idx = tmp_path / "out_text_document.idx"
    assert preprocess(corpus, prefix=tmp_path / "out") == 0
    before = idx.stat().st_mtime_ns
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
    for damaged in (data[:-20], b"not gzip at all"):
        path.write_bytes(damaged)
        assert preprocess(path, prefix=tmp_path / "out", flags=("--on-bad-record", "skip")) == 2
        assert "damaged gzip data after line" in capsys.readouterr().err
        assert left_in(tmp_path) == []


def test_deep_nesting_is_broken_json_and_no_crash():
    with pytest.raises(BadRecord, match="broken_json"):
        parse_record(b"[" * 200_000, ["text"])


def test_long_lines_are_read_in_bounded_pieces(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(b"x" * 10 + b"\n" + b"y" * 3_000_000 + b"\n" + b"z" * 11 + b"\r\n\n" + b"w" * 10)
    lines = list(read_lines(path, 10))
    assert [(number, is_too_long) for number, _, is_too_long in lines] == [
        (1, False), (2, True), (3, True), (4, False), (5, False),
    ]  # fmt: skip
    assert [line for _, line, is_too_long in lines if not is_too_long] == [b"x" * 10, b"", b"w" * 10]


def run_forked(argv: list[str]) -> multiprocessing.Process:
    process = multiprocessing.get_context("fork").Process(target=lambda: os._exit(preprocess_data.main(argv)))
    process.start()
    return process


def children_of(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def test_killed_run_leaves_no_name_no_process_and_can_be_run_again(sp_model, tmp_path):
    corpus = write_jsonl(tmp_path / "in.jsonl", make_texts(2000) * 10)
    flags = ("--append-eod", "--workers", "2")
    (tmp_path / "whole").mkdir()
    assert preprocess(corpus, prefix=tmp_path / "whole" / "out", model=sp_model, flags=flags) == 0
    argv = ["--input", str(corpus), "--output-prefix", str(tmp_path / "out"), *flags]
    argv += ["--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", str(sp_model)]
    partial = tmp_path / ".out.partial" / "out_text_document.bin"
    for written_bytes in (0, 100_000):
        process = run_forked(argv)
        deadline_s = time.monotonic() + 30
        while not (partial.exists() and partial.stat().st_size > written_bytes and children_of(process.pid)):
            assert process.is_alive() and time.monotonic() < deadline_s, "not caught while writing"
            time.sleep(0.002)
        workers = children_of(process.pid)
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        assert left_in(tmp_path) == [".out.partial"]
        while any(map(is_running, workers)):
            assert time.monotonic() < deadline_s, "a worker outlived the run"
            time.sleep(0.01)
    assert preprocess_data.main(argv) == 0
    assert left_in(tmp_path) == [f"out_text_document.{suffix}" for suffix in ("bin", "idx", "json")]
    for path in (tmp_path / "whole").iterdir():
        assert (tmp_path / path.name).read_bytes() == path.read_bytes()


def test_dead_worker_ends_the_run(tmp_path, monkeypatch, capsys):
    corpus = tmp_path / "in.jsonl"
    corpus.write_text('{"text": "1"}\n' * 50 + '{"text": "13"}\n' + '{"text": "1"}\n' * 50)
    monkeypatch.setattr(encoding, "CHUNK_BYTES", 100)
    real = encoding.Encoder._ids
    monkeypatch.setattr(encoding.Encoder, "_ids", lambda self, text: os._exit(9) if text == "13" else real(self, text))
    assert preprocess(corpus, prefix=tmp_path / "out", flags=("--workers", "2")) == 1
    assert "worker process died" in capsys.readouterr().err
    assert left_in(tmp_path) == []


def test_second_run_on_the_same_prefix_is_refused(tmp_path, capsys):
    from hmoe_megatron.data_prep.files import Output

    corpus = tmp_path / "in.jsonl"
    corpus.write_text('{"text": "1"}\n')
    first = Output(str(tmp_path / "out"), ["text"], encoding.np.uint16)
    assert preprocess(corpus, prefix=tmp_path / "out") == 2
    assert "another run is writing it" in capsys.readouterr().err
    first.close()
    assert preprocess(corpus, prefix=tmp_path / "out") == 0


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
        (["--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", "none.model"], "none.model"),
        (["--output-prefix", "/none/out"], "--output-prefix /none/out"),
        (["--input", "/none.jsonl"], "--input /none.jsonl: no such file"),
        (["--null-tokenizer-eod-id", "100", "--append-eod"], "end-of-document id 100"),
    ],
)
def test_preprocess_refusals(flags, message, tmp_path, capsys):
    corpus = tmp_path / "in.jsonl"
    corpus.write_text('{"text": "1"}\n')
    assert preprocess(corpus, prefix=tmp_path / "out", flags=flags) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert left_in(tmp_path) == []


def test_a_run_that_keeps_no_document_is_refused(tmp_path, capsys):
    corpus = tmp_path / "in.jsonl"
    for content, message in ((b"", "in 0 lines"), (b"\n\n", "blank_line 2")):
        corpus.write_bytes(content)
        assert preprocess(corpus, prefix=tmp_path / "out", flags=("--on-bad-record", "skip")) == 2
        assert message in capsys.readouterr().err
        assert left_in(tmp_path) == []


def test_flags_of_neither_tool_nor_megatron_are_refused(tmp_path, capsys):
    corpus = tmp_path / "in.jsonl"
    corpus.write_text('{"text": "1"}\n')
    with pytest.raises(SystemExit) as stop:
        preprocess(corpus, prefix=tmp_path / "out", flags=("--no-such-flag",))
    assert stop.value.code == 2 and "--no-such-flag" in capsys.readouterr().err


def test_megatron_loads_the_tokenizer_and_its_special_ids(sp_model):
    args, rest = preprocess_data.parse_flags(
        ["--input", "x", "--output-prefix", "y", "--tokenizer-type", "SentencePieceTokenizer",
         "--tokenizer-model", str(sp_model)]
    )  # fmt: skip
    encoder = encoding.Encoder(preprocess_data.megatron_tokenizer_args(args, rest), ["text"], True)
    tokenizer = encoder.tokenizer
    assert (tokenizer.unk, tokenizer.bos, tokenizer.eod, tokenizer.pad) == (0, 1, EOD_ID, 3)
    assert tokenizer.vocab_size == SP_VOCAB_SIZE
    text = " two  spaces\n\nand lines "
    assert tokenizer.detokenize(tokenizer.tokenize(text)) == text


def test_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "a"
    write_whole(path, b"old")
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write_whole(path, b"new")
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]
