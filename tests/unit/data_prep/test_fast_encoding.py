"""Every way to the ids gives Megatron's own ids, or is not taken."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hmoe_megatron.tools.data_prep import fast_encoding
from hmoe_megatron.tools.data_prep.encoding import Encoder
from hmoe_megatron.tools.data_prep.runs import megatron_tokenizer_args
from tests.unit.data_prep.calls import argv_of, make_texts, preprocess_data
from tests.unit.data_prep.conftest import make_bpe

TEXTS = [
    *make_texts(50),
    "ünï 😀\u2028\n",
    "<s> </s> <|endoftext|> a",
    "  two  spaces\t\n\n",
    "İ ﬁ é e\u0301",
    "\x00\x01",
    "a",
]


def encoder_of(model, sample=TEXTS, flags=()):
    args, rest = preprocess_data.parse_flags(argv_of("x", prefix="y", model=model, flags=flags))
    return Encoder(megatron_tokenizer_args(args, rest), ["text"], False, 1 << 20, sample)


UNUSED = "<|unused|>"  # what tiktoken is given as its one special token


def assert_equal(encoder, texts):
    expected = [encoder.tokenizer.tokenize(text) for text in texts]
    assert [ids.tolist() for ids in encoder.way(texts)] == expected


@pytest.fixture(scope="module")
def byte_level(bpe_folder):
    return encoder_of(bpe_folder)


def test_a_byte_level_bpe_goes_through_tiktoken(byte_level):
    assert byte_level.way_name.startswith("tiktoken with the same vocabulary, equal on ")
    assert_equal(byte_level, [*TEXTS, UNUSED, f"a {UNUSED}{UNUSED}<|unused", UNUSED * 100])


@given(st.lists(st.text(max_size=60), max_size=5))
@settings(max_examples=200, deadline=None)
def test_any_text_has_the_same_ids(byte_level, texts):
    assert_equal(byte_level, texts)


def test_a_sentencepiece_bpe_goes_through_tiktoken(sp_model):
    encoder = encoder_of(sp_model)
    assert encoder.way_name.startswith("SentencePiece's merges through tiktoken, equal on ")
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

    assert len(fast_encoding.KNOWN_PATTERNS) == 4
    for number, pattern in enumerate([*sorted(fast_encoding.KNOWN_PATTERNS), r"[[:alpha:]]+|\s+|.", r"\p{L}+"]):
        cut = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(pattern), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        encoder = encoder_of(make_bpe(tmp_path / str(number), normalizers.NFC(), cut), TEXTS[:10])
        known = pattern in fast_encoding.KNOWN_PATTERNS
        assert encoder.way_name.startswith("tiktoken with the same" if known else "the tokenizers library")
        assert known or "it cuts by a pattern of its own" in encoder.way_name
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


def changed(tmp_path, bpe_folder, change):
    """The tokenizer with what `change` makes of the parts of its file."""
    for file in bpe_folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    parts = json.loads((tmp_path / "tokenizer.json").read_text())
    change(parts)
    (tmp_path / "tokenizer.json").write_text(json.dumps(parts))
    return tmp_path


def test_a_vocabulary_in_another_order_is_mapped(tmp_path, bpe_folder):
    def change(parts):
        vocab = parts["model"]["vocab"]
        parts["model"]["vocab"] = {token: len(vocab) - id if id else 0 for token, id in vocab.items()}

    encoder = encoder_of(changed(tmp_path, bpe_folder, change))
    assert encoder.way_name.startswith("tiktoken with the same vocabulary")
    assert_equal(encoder, TEXTS)


@pytest.mark.parametrize("ignore_merges", [False, True])
def test_an_entry_that_merging_never_makes_is_found(ignore_merges, tmp_path, bpe_folder):
    """tiktoken makes any entry that bytes spell; merging may come to other pieces."""
    entries = []

    def change(parts):
        merges, vocab = parts["model"]["merges"], parts["model"]["vocab"]
        first, second = "".join(merges[0]), "".join(merges[1])
        entries.extend([first[1] + second, first + second])
        for token in entries:
            vocab[token] = len(vocab)
        merges += [[first[1], second], [first[0], first[1] + second]]  # first[0] and first[1] merge before
        parts["model"]["ignore_merges"] = ignore_merges

    encoder = encoder_of(changed(tmp_path, bpe_folder, change))
    assert "not tiktoken with the same vocabulary: its merges do not make its entry" in encoder.way_name
    assert_equal(encoder, [*TEXTS, *entries, entries[1] + "z"])


def test_an_entry_without_a_merge_is_found(tmp_path, bpe_folder):
    """With ignore_merges a whole piece is taken that no merge makes."""

    def change(parts):
        parts["model"]["ignore_merges"] = True
        parts["model"]["vocab"]["xyzxyz"] = len(parts["model"]["vocab"])

    encoder = encoder_of(changed(tmp_path, bpe_folder, change))
    assert "its vocabulary is not 256 bytes and one entry a merge" in encoder.way_name
    assert_equal(encoder, [*TEXTS, "xyzxyz"])


def test_ignore_merges_goes_through_tiktoken(tmp_path, bpe_folder):
    encoder = encoder_of(changed(tmp_path, bpe_folder, lambda parts: parts["model"].update(ignore_merges=True)))
    assert encoder.way_name.startswith("tiktoken with the same vocabulary")
    assert_equal(encoder, TEXTS)


@pytest.mark.parametrize(("form", "content", "text"), [("NFKC", "ﬁ", "fi"), ("NFC", "e\u0301", "é")])
def test_an_added_token_is_found_in_its_normal_form(form, content, text, tmp_path, bpe_folder):
    def change(parts):
        parts["normalizer"] = {"type": form}
        token = {"content": content, "id": len(parts["model"]["vocab"]), "normalized": True, "special": False}
        parts["added_tokens"].append(parts["added_tokens"][0] | token)

    encoder = encoder_of(changed(tmp_path, bpe_folder, change), ["abc"])
    assert encoder.way_name.startswith("tiktoken with the same vocabulary")
    assert_equal(encoder, [text, content, f"a{text}b"])


def test_nothing_is_proven_on_nothing(bpe_folder):
    encoder = encoder_of(bpe_folder, [])
    assert encoder.way is encoder.stock and "no text of the input" in encoder.way_name


def test_sentencepiece_with_special_tokens_of_megatrons_goes_its_way(sp_model):
    encoder = encoder_of(sp_model, ["abc"], ("--tokenizer-sentencepiece-legacy", "--tokenizer-special-tokens", "<x>"))
    assert "Megatron looks for special tokens in the text" in encoder.way_name
    assert_equal(encoder, ["abc <x> abc"])


def test_a_way_that_differs_on_the_sample_is_not_taken(byte_level, monkeypatch):
    wrong = {"wrong": lambda tokenizer, stock: lambda texts: [np.zeros(1, int) for _ in texts]}
    monkeypatch.setattr(fast_encoding, "WAYS", wrong)
    name, way = fast_encoding.find_way(byte_level.tokenizer, TEXTS, byte_level.stock)
    assert name.startswith("Megatron's tokenizer, text by text; not wrong: other ids for")
    assert way(["a"])[0].tolist() == byte_level.tokenizer.tokenize("a")


def test_a_way_that_differs_later_is_found_by_the_spot_check(bpe_folder, tmp_path):
    from hmoe_megatron.tools.data_prep.sources import Block

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
    entries = [
        {"rank": rank, "token_bytes": base64.b64encode(word).decode(), "token_str": word.decode("latin-1")}
        for rank, word in enumerate(words)
    ]
    (tmp_path / "vocab.json").write_text(json.dumps(entries))
    argv = [
        "--input",
        "x",
        "--output-prefix",
        "y",
        "--tokenizer-type",
        "TikTokenizer",
        "--tokenizer-model",
        str(tmp_path / "vocab.json"),
        "--vocab-size",
        str(len(words) + 20),
        "--tiktoken-num-special-tokens",
        "20",
    ]
    args, rest = preprocess_data.parse_flags(argv)
    texts = ["abc ab a", "x <s> ab", "é"]
    encoder = Encoder(megatron_tokenizer_args(args, rest), ["text"], False, 1 << 20, texts)
    assert encoder.way_name.startswith("tiktoken to arrays")
    assert_equal(encoder, texts)
