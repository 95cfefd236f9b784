"""Every way to the ids gives Megatron's own ids, or is not taken."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hmoe_megatron.data_prep import fast_encoding
from hmoe_megatron.data_prep.encoding import Encoder
from hmoe_megatron.data_prep.runs import megatron_tokenizer_args
from tests.unit.data_prep.calls import argv_of, make_texts, preprocess_data
from tests.unit.data_prep.conftest import make_bpe

TEXTS = [*make_texts(50), "ünï 😀\u2028\n", "<s> </s> <|endoftext|> a", "  two  spaces\t\n\n", "İ ﬁ é e\u0301",
         "\x00\x01", "a"]  # fmt: skip


def encoder_of(model, sample=TEXTS, flags=()):
    args, rest = preprocess_data.parse_flags(argv_of("x", prefix="y", model=model, flags=flags))
    return Encoder(megatron_tokenizer_args(args, rest), ["text"], False, 1 << 20, sample)


def assert_equal(encoder, texts):
    expected = [encoder.tokenizer.tokenize(text) for text in texts]
    assert [ids.tolist() for ids in encoder.way(texts)] == expected


@pytest.fixture(scope="module")
def byte_level(bpe_folder):
    return encoder_of(bpe_folder)


def test_a_byte_level_bpe_goes_through_tiktoken(byte_level):
    assert byte_level.way_name.startswith("tiktoken with the same vocabulary, equal on ")
    assert_equal(byte_level, TEXTS)


@given(st.lists(st.text(max_size=60), max_size=5))
@settings(max_examples=200, deadline=None)
def test_any_text_has_the_same_ids(byte_level, texts):
    assert_equal(byte_level, texts)


def test_sentencepiece_goes_by_lists(sp_model):
    encoder = encoder_of(sp_model)
    assert encoder.way_name.startswith("SentencePiece by lists")
    assert_equal(encoder, TEXTS)


def test_what_tiktoken_cannot_hold_goes_by_the_tokenizers_library(tmp_path):
    from tokenizers import normalizers, pre_tokenizers

    digits = pre_tokenizers.Sequence([pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(add_prefix_space=False)])
    for folder, parts, reason in (
        ("digits", {"pre_tokenizer": digits}, "it cuts by Digits and ByteLevel"),
        ("prefix", {"pre_tokenizer": pre_tokenizers.ByteLevel(add_prefix_space=True)}, "it adds a space"),
        ("lower", {"normalizer": normalizers.Lowercase()}, "it normalises by Lowercase"),
    ):
        encoder = encoder_of(make_bpe(tmp_path / folder, **parts))
        assert encoder.way_name.startswith("the tokenizers library by lists, equal on")
        assert f"not tiktoken with the same vocabulary: {reason}" in encoder.way_name
        assert_equal(encoder, TEXTS)


def test_unicode_normal_forms_and_patterns_go_through_tiktoken(tmp_path):
    from tokenizers import Regex, normalizers, pre_tokenizers

    pattern = r"(?i:'s|'t)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    cut = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"),
                                   pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])  # fmt: skip
    encoder = encoder_of(make_bpe(tmp_path, normalizers.NFC(), cut))
    assert encoder.way_name.startswith("tiktoken with the same vocabulary")
    assert_equal(encoder, TEXTS)


def test_ids_around_each_text_are_kept(tmp_path, bpe_folder):
    from tokenizers import Tokenizer, processors

    tokenizer = Tokenizer.from_file(str(bpe_folder / "tokenizer.json"))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A <|endoftext|>", special_tokens=[("<|endoftext|>", 0)]
    )
    for file in bpe_folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    encoder = encoder_of(tmp_path)
    assert encoder.way_name.startswith("tiktoken with the same vocabulary")
    (ids,) = encoder.way(["a"])
    assert ids[0] == ids[-1] == 0 and len(ids) == 3
    assert_equal(encoder, TEXTS)


def test_a_vocabulary_in_another_order_is_mapped(tmp_path, bpe_folder):
    for file in bpe_folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    parts = json.loads((tmp_path / "tokenizer.json").read_text())
    vocab = parts["model"]["vocab"]
    size = len(vocab)
    parts["model"]["vocab"] = {token: size - id if id else 0 for token, id in vocab.items()}
    (tmp_path / "tokenizer.json").write_text(json.dumps(parts))
    encoder = encoder_of(tmp_path)
    assert encoder.way_name.startswith("tiktoken with the same vocabulary")
    assert_equal(encoder, TEXTS)


def test_an_entry_that_merging_never_makes_is_found(tmp_path, bpe_folder):
    """tiktoken takes a whole piece that is in the vocabulary; merging may come to other pieces."""
    for file in bpe_folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    parts = json.loads((tmp_path / "tokenizer.json").read_text())
    merges, vocab = parts["model"]["merges"], parts["model"]["vocab"]
    first, second = "".join(merges[0]), "".join(merges[1])
    unreachable = [first[0], first[1] + second]  # first[0] and first[1] merge before
    for token in (first[1] + second, first + second):
        vocab[token] = len(vocab)
    merges += [[first[1], second], unreachable]
    (tmp_path / "tokenizer.json").write_text(json.dumps(parts))
    encoder = encoder_of(tmp_path)
    assert "not tiktoken with the same vocabulary: its merges do not make its entry" in encoder.way_name
    assert_equal(encoder, [*TEXTS, first + second])


def test_a_way_that_differs_on_the_sample_is_not_taken(byte_level, monkeypatch):
    wrong = {"wrong": lambda tokenizer, stock: lambda texts: [np.zeros(1, int) for _ in texts]}
    monkeypatch.setattr(fast_encoding, "WAYS", wrong)
    name, way = fast_encoding.find_way(byte_level.tokenizer, TEXTS)
    assert name.startswith("Megatron's tokenizer, text by text; not wrong: other ids for")
    assert way(["a"])[0].tolist() == byte_level.tokenizer.tokenize("a")


def test_a_way_that_differs_later_is_found_by_the_spot_check(bpe_folder, tmp_path):
    from hmoe_megatron.data_prep.sources import Block

    encoder = encoder_of(bpe_folder)
    encoder.way = lambda texts: [np.zeros(1, int) for _ in texts]
    with pytest.raises(ValueError, match="but not on 'abc'; start again with --stock-tokenizer"):
        encoder.encode(Block(b'{"text": "abc"}\n', 16, 16), "json")


def test_without_a_sample_it_is_megatrons_own(bpe_folder):
    encoder = encoder_of(bpe_folder, None)
    assert encoder.way is encoder.stock and encoder.way_name == "Megatron's tokenizer, text by text"


def test_tiktokens_own_tokenizer_goes_to_arrays(tmp_path):
    import base64

    words = [bytes([byte]) for byte in range(256)] + [b"ab", b"abc", b" a"]
    entries = [{"rank": rank, "token_bytes": base64.b64encode(word).decode(), "token_str": word.decode("latin-1")}
               for rank, word in enumerate(words)]  # fmt: skip
    (tmp_path / "vocab.json").write_text(json.dumps(entries))
    argv = ["--input", "x", "--output-prefix", "y", "--tokenizer-type", "TikTokenizer", "--tokenizer-model",
            str(tmp_path / "vocab.json"), "--vocab-size", str(len(words) + 20), "--tiktoken-num-special-tokens",
            "20"]  # fmt: skip
    args, rest = preprocess_data.parse_flags(argv)
    texts = ["abc ab a", "x <s> ab", "é"]
    encoder = Encoder(megatron_tokenizer_args(args, rest), ["text"], False, 1 << 20, texts)
    assert encoder.way_name.startswith("tiktoken to arrays")
    assert_equal(encoder, texts)
