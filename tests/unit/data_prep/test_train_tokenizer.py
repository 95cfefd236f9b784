"""Tokenizers that give any text back, the same for the same text."""

import gzip
import json
import random
import re
import sys

import pytest
import sentencepiece
from tokenizers import Tokenizer

from hmoe_megatron.tools.data_prep.tokenizer_training import END_OF_TEXT, PAD_ID, sample
from tests.unit.data_prep.calls import ROOT, SP_VOCAB_SIZE, make_texts, write_jsonl

sys.path.insert(0, str(ROOT / "tools"))
import train_tokenizer  # noqa: E402

FIXED = ["", " ", "\n", " a", "a ", "  a  b\n\n c\n", "\r\n\t\0", "<s></s><unk><pad><0x0A>", "☯ ⁇ \u2028\ufeff"]


def any_texts(count: int) -> list[str]:
    rng = random.Random(1)
    ranges = ((0, 0x80), (0, 0x3000), (0, 0x110000))
    drawn = ["".join(chr(rng.randrange(*rng.choice(ranges))) for _ in range(rng.randrange(30))) for _ in range(count)]
    return [text.encode("utf-8", "ignore").decode() for text in FIXED + make_texts(20, seed=5) + drawn]


def train(corpus, output, vocab_size=SP_VOCAB_SIZE, flags=()):
    argv = ["--input", str(corpus), "--vocab-size", str(vocab_size), "--output", str(output), *flags]
    return train_tokenizer.main(argv)


@pytest.fixture(scope="module")
def bpe(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bpe")
    corpus = write_jsonl(folder / "train.jsonl", make_texts(300))
    assert train(corpus, folder / "tok", flags=("--type", "byte-level-bpe", "--special-tokens", "<|user|>")) == 0
    return folder


def test_sentencepiece_gives_any_text_back(sp_model):
    tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(sp_model))
    for text in any_texts(2000):
        text = text.replace("\u2581", "")
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert all(id > PAD_ID for id in ids), "text can make no special id"
    assert tokenizer.decode(tokenizer.encode("a\u2581b")) == "a b"  # the documented exception


def test_byte_level_bpe_gives_any_text_back(bpe):
    tokenizer = Tokenizer.from_file(str(bpe / "tok/tokenizer.json"))
    for text in any_texts(2000):
        ids = tokenizer.encode(text).ids
        assert tokenizer.decode(ids, skip_special_tokens=False) == text
    assert tokenizer.get_vocab_size() == SP_VOCAB_SIZE
    assert [tokenizer.id_to_token(id) for id in (0, 1)] == [END_OF_TEXT, "<|user|>"]
    assert tokenizer.encode("<|user|>").ids == [1]


def test_transformers_and_megatron_load_the_byte_level_bpe(bpe):
    from megatron.core.tokenizers import MegatronTokenizer
    from transformers import AutoTokenizer

    own = AutoTokenizer.from_pretrained(bpe / "tok")
    megatron = MegatronTokenizer.from_pretrained(str(bpe / "tok"), metadata_path={"library": "huggingface"})
    assert own.eos_token_id == megatron.eod == 0 and len(own) == megatron.vocab_size == SP_VOCAB_SIZE
    for text in any_texts(50):
        assert own(text).input_ids == megatron.tokenize(text)


def test_sentencepiece_is_deterministic_and_lists_its_vocabulary(sp_model, tmp_path):
    assert train(sp_model.with_name("train.jsonl"), tmp_path / "other") == 0
    assert (tmp_path / "other.model").read_bytes() == sp_model.read_bytes()
    rows = (tmp_path / "other.vocab").read_text().split("\n")[:-1]
    assert [row.split("\t")[0] for row in rows[:5]] == ["<unk>", "<s>", "</s>", "<pad>", "<0x00>"]
    assert len(rows) == SP_VOCAB_SIZE
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other.model", "other.report.json", "other.vocab"]


def test_byte_level_bpe_is_deterministic(bpe, tmp_path):
    flags = ("--type", "byte-level-bpe", "--special-tokens", "<|user|>")
    assert train(bpe / "train.jsonl", tmp_path / "tok", flags=flags) == 0
    for path in (bpe / "tok").iterdir():
        assert (tmp_path / "tok" / path.name).read_bytes() == path.read_bytes()


def test_special_tokens_of_sentencepiece_become_one_id(tmp_path):
    corpus = write_jsonl(tmp_path / "in.jsonl", make_texts(200))
    assert train(corpus, tmp_path / "tok", flags=("--special-tokens", "<|a|>", "<|b|>")) == 0
    tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tok.model"))
    assert tokenizer.encode("<|b|><|a|>") == [5, 4]


@pytest.mark.parametrize("kind", train_tokenizer.KINDS)
def test_the_report_is_of_held_out_text(kind, tmp_path):
    texts = make_texts(300) + ["ü😀" * 20] * 3
    corpus = write_jsonl(tmp_path / "in.jsonl", texts)
    assert train(corpus, tmp_path / "tok", flags=("--type", kind)) == 0
    report = json.loads((tmp_path / "tok.report.json").read_text())
    assert report["documents"] == {"seen": 303, "trained_on": 300, "held_out": 3}
    held_out = texts[99::100]
    built = train_tokenizer.KINDS[kind].train([t for n, t in enumerate(texts, 1) if n % 100], SP_VOCAB_SIZE, [])
    tokens = sum(len(built.encode(text)) for text in held_out)
    assert report["bytes_per_token"] == pytest.approx(sum(len(text.encode()) for text in held_out) / tokens)
    fallback = train_tokenizer.measure(built, ["ß" * 30]).fallback_share  # not in the text: two bytes each
    assert fallback == 1 and report["fallback_share"] < 0.5


def test_text_gzip_and_paragraphs_train_alike(tmp_path):
    texts = [text.strip() for text in make_texts(50)]
    (tmp_path / "a.txt").write_text("\n\n".join(texts))
    with gzip.open(tmp_path / "b.txt.gz", "wt") as file:
        file.write("\n\n".join(texts))
    write_jsonl(tmp_path / "c.jsonl", texts)
    for name in ("a.txt", "b.txt.gz", "c.jsonl"):
        assert train(tmp_path / name, tmp_path / name, 300) == 0
    models = [(tmp_path / f"{name}.model").read_bytes() for name in ("a.txt", "b.txt.gz", "c.jsonl")]
    assert models[0] == models[1] == models[2]


def test_sample_is_bounded_seeded_in_order_and_uniform():
    texts = [f"{n:04}" for n in range(1000)]
    kept, seen = sample(iter(texts), 400, seed=3)
    assert seen == 1000 and len(kept) == 100 and kept == sorted(kept)
    assert sample(iter(texts), 400, seed=3)[0] == kept
    assert sample(iter(texts), 400, seed=4)[0] != kept
    assert sample(iter(texts), 10**6, seed=3)[0] == texts
    with_long = [texts[0], "x" * 1000, *texts[1:]]
    kept = sample(iter(with_long), 400, seed=3)[0]
    assert "x" * 1000 not in kept and len(kept) == 100
    means = [sum(map(int, sample(iter(texts), 400, seed)[0])) / 100 for seed in range(50)]
    assert abs(sum(means) / 50 - 499.5) < 20  # standard error: 289 / sqrt(5000) = 4


def test_the_least_vocabulary_is_the_one_that_is_named(tmp_path, capsys):
    corpus = write_jsonl(tmp_path / "in.jsonl", make_texts(100))
    assert train(corpus, tmp_path / "tok", 262) == 2
    least = int(re.search(r"need --vocab-size (\d+) or more", capsys.readouterr().err)[1])
    assert train(corpus, tmp_path / "tok", least - 1) == 2 and train(corpus, tmp_path / "tok", least) == 0


@pytest.mark.parametrize(
    ("flags", "content", "message"),
    [
        (["--vocab-size", "200"], b'{"text": "a"}\n', "need 261 or more"),
        (["--vocab-size", "200", "--type", "byte-level-bpe"], b'{"text": "a"}\n', "need 258 or more"),
        (["--vocab-size", "4000"], b'{"text": "a b"}\n', "or less, or more text than"),
        (["--vocab-size", "4000", "--type", "byte-level-bpe"], b'{"text": "a b"}\n', "--vocab-size 258 or less"),
        (["--vocab-size", "300"], b'{"text": "a"}\n{"text": 3}\n', "in.jsonl:2: not_a_string"),
        (["--vocab-size", "300"], b"", "no text"),
        (["--vocab-size", "300", "--max-train-bytes", "0"], b'{"text": "a"}\n', "positive"),
        (["--vocab-size", "300", "--special-tokens", "a", "a"], b'{"text": "a"}\n', "give each once"),
    ],
)
def test_refusals(flags, content, message, tmp_path, capsys):
    (tmp_path / "in.jsonl").write_bytes(content)
    argv = ["--input", str(tmp_path / "in.jsonl"), "--output", str(tmp_path / "tok"), *flags]
    assert train_tokenizer.main(argv) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]
