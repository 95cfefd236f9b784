"""SentencePiece's BPE through tiktoken gives SentencePiece's own ids, or says why it can't."""

import io

import numpy as np
import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from hmoe_megatron.data.sentencepiece_bpe import tiktoken_encoder
from tests.unit.data_prep.calls import make_texts

OURS = {
    "normalization_rule_name": "identity",
    "remove_extra_whitespaces": False,
    "add_dummy_prefix": False,
    "byte_fallback": True,
}
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
TEXTS = [
    *make_texts(20),
    "",
    " ",
    "\n",
    "a",
    "  two  spaces\t\n\n end\n",
    "ﬁ\u3000x e\u0301 ünï 😀😀 ☃ ☃",
    "▁a▁▁b ▁",
    "\ue000 \ue001a\ue002",
    "a\x00b \x01",
    "x<sep>y <s></s>",
    "foo(bar), 3.14_2 ²½",
    "\r\n  \u2028 \u00a0 z",
    "in new york now, new  york",
    "w" * 200 + " " + "w" * 200,
    "é日本 ع\u0301 ¼ \ufffd \ue000",
    "the" * 3000,
]


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
    found = tiktoken_encoder(processor, stock_of(processor))(texts)
    assert [ids.tolist() for ids in found] == [processor.encode(text) for text in texts]


def test_texts_have_the_same_ids(processor):
    assert_equal(processor, TEXTS)


@given(texts=st.lists(st.text(max_size=40) | st.text("a( \n▁1é☃\t.", max_size=30), max_size=4))
@settings(max_examples=60, deadline=None)
def test_any_text_has_the_same_ids(processor, texts):
    assert_equal(processor, texts)


def test_only_texts_with_symbols_go_the_stock_way():
    processor, asked = trained(**OURS | {"user_defined_symbols": ["<sep>", "\t"]}), []
    tiktoken_encoder(processor, stock_of(processor, asked))(TEXTS)
    assert asked == [text for text in TEXTS if "<sep>" in text] != []


def test_characters_that_are_no_entry_are_bytes_beside_those_that_are():
    """Characters that begin with the same bytes as an entry do."""
    processor = trained(**OURS | {"required_chars": "é日😀"})
    known = ["é", "日", "😀"]
    assert all(len(processor.encode(char)) == 1 for char in known)
    texts = [f"a{char}{other}é b" for char in known for other in "èêë旦昌😁😂\N{REPLACEMENT CHARACTER}"]
    assert all(any(map(processor.is_byte, processor.encode(text))) for text in texts)
    assert_equal(processor, texts)


def edited(processor, change):
    """The processor whose model's pieces `change` has altered."""
    from sentencepiece import sentencepiece_model_pb2

    model = sentencepiece_model_pb2.ModelProto.FromString(processor.serialized_model_proto())
    change(model)
    return sentencepiece.SentencePieceProcessor(model_proto=model.SerializeToString())


@pytest.mark.parametrize("dropped", ["é", "e", "▁"])
def test_entries_of_characters_that_are_none(dropped):
    """A character may be in an entry and be none itself."""

    def drop(model):
        (number,) = [number for number, piece in enumerate(model.pieces) if piece.piece == dropped]
        del model.pieces[number]

    texts = ["é", "ér", "the réré é e ee", "rérér  ▁ é é", *TEXTS]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["the réré éré there"] * 50),
        model_writer=model,
        model_type="bpe",
        vocab_size=290,
        hard_vocab_limit=False,
        minloglevel=2,
        **OURS,
    )
    processor = edited(sentencepiece.SentencePieceProcessor(model_proto=model.getvalue()), drop)
    assert_equal(processor, texts)


def test_entries_that_differ_in_how_a_space_is_written_are_refused():
    processor = trained(**OURS | {"user_defined_symbols": ["▁b", " b"]})
    with pytest.raises(ValueError, match="differ only in how a space is written"):
        tiktoken_encoder(processor, stock_of(processor))


def test_every_entry_has_its_own_ids(processor):
    pieces = [processor.id_to_piece(number).replace("▁", " ") for number in range(processor.vocab_size())]
    assert_equal(processor, pieces + [f"x{piece}y" for piece in pieces] + [f" {piece}{piece} " for piece in pieces])


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"model_type": "unigram"}, "no BPE"),
        ({"split_by_whitespace": False}, "an entry holds a space after other characters"),
        ({"treat_whitespace_as_suffix": True}, "an entry holds a space after other characters"),
    ],
)
def test_other_models_are_refused(options, reason):
    processor = trained(**options)
    with pytest.raises(ValueError, match=reason):
        tiktoken_encoder(processor, stock_of(processor))
