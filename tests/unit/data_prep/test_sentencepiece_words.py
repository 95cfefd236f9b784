"""SentencePiece word by word gives SentencePiece's own ids, or says why it can't."""

import io

import numpy as np
import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from hmoe_megatron.data_prep import sentencepiece_words
from hmoe_megatron.data_prep.sentencepiece_words import word_encoder
from tests.unit.data_prep.calls import make_texts

OURS = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False, "add_dummy_prefix": False,
        "byte_fallback": True}  # fmt: skip
KINDS = {
    "ours": OURS,
    "llama": OURS | {"add_dummy_prefix": True, "allow_whitespace_only_pieces": True},
    "stock": {},
    "no prefix, no bytes": {"add_dummy_prefix": False, "remove_extra_whitespaces": False},
    "line ends known": OURS | {"byte_fallback": False, "user_defined_symbols": ["\n", "<sep>"]},
    "across scripts": OURS | {"split_by_unicode_script": False, "split_by_number": False},
    "a space in a symbol": {"user_defined_symbols": ["new york"]},  # kept as it is, never written as SPACE
    "line ends inside": OURS | {"user_defined_symbols": ["\n\n", "end\n"]},
}
TEXTS = [*make_texts(20), "", " ", "\n", "a", "  two  spaces\t\n\n end\n", "ﬁ\u3000x e\u0301 ünï 😀😀 ☃ ☃", "▁a▁▁b ▁",
         "\ue000 \ue001a\ue002", "a\x00b \x01", "x<sep>y <s></s>", "foo(bar), 3.14_2 ²½", "\r\n  \u2028 \u00a0 z",
         "in new york now, new  york", "w" * 200 + " " + "w" * 200]  # fmt: skip


def trained(**options):
    model = io.BytesIO()
    texts = [text.replace("\n", " ") for text in make_texts(300)] + ["the  end (of) it, 12.5% a_b"] * 50
    options = {"model_type": "bpe", "vocab_size": 600, "minloglevel": 2, "hard_vocab_limit": False} | options
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(texts), model_writer=model, **options)
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())


@pytest.fixture(scope="module", params=KINDS)
def processor(request):
    return trained(**KINDS[request.param])


def stock_of(processor, asked=None):
    def stock(texts):
        asked is None or asked.extend(texts)
        return [np.array(processor.encode(text), dtype=np.int32) for text in texts]

    return stock


def assert_equal(processor, texts):
    found = word_encoder(processor, stock_of(processor))(texts)
    assert [ids.tolist() for ids in found] == [processor.encode(text) for text in texts]


def test_words_have_the_ids_of_the_text(processor):
    assert_equal(processor, TEXTS)


@given(texts=st.lists(st.text(max_size=40) | st.text("a( \n▁1é☃\t.", max_size=30), max_size=4))
@settings(max_examples=150, deadline=None)
def test_any_text_has_the_same_ids(processor, texts):
    assert_equal(processor, texts)


def test_a_full_memory_changes_nothing(processor, monkeypatch):
    monkeypatch.setattr(sentencepiece_words, "MAX_REMEMBERED", 3)
    assert_equal(processor, TEXTS * 2)


def test_only_texts_with_our_own_marks_go_the_stock_way():
    processor, asked = trained(**OURS), []
    word_encoder(processor, stock_of(processor, asked))(TEXTS)
    assert asked == [text for text in TEXTS if "\ue000" in text]


@pytest.mark.parametrize(("options", "reason"), [
    ({"model_type": "unigram"}, "no BPE"),
    ({"split_by_whitespace": False}, "an entry holds a space after other characters"),
    ({"treat_whitespace_as_suffix": True}, "an entry holds a space after other characters"),
])  # fmt: skip
def test_what_is_not_independent_is_refused(options, reason):
    processor = trained(**options)
    with pytest.raises(ValueError, match=reason):
        word_encoder(processor, stock_of(processor))
