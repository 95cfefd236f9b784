"""transformers gives the ids that Megatron gives, for any text, or the export is refused."""

import random
import warnings

import pytest
import sentencepiece
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hmoe_megatron.hf import tokenizer_files

WORDS = "the of and model expert width plan token Zwölf naïve Ελληνικά 日本語 x1 2026 don't --flag a,b (c)".split()
# As tools/train_tokenizer.py trains, as LLaMA's is, and one without byte pieces.
SENTENCEPIECE = {
    "ours": {
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "add_dummy_prefix": False,
        "remove_extra_whitespaces": False,
        "user_defined_symbols": ["<sep>"],
    },
    "as LLaMA's": {"byte_fallback": True, "normalization_rule_name": "identity", "remove_extra_whitespaces": False},
    "normalized": {"normalization_rule_name": "nmt_nfkc", "byte_fallback": True},
    "unknown characters": {
        "normalization_rule_name": "identity",
        "add_dummy_prefix": False,
        "remove_extra_whitespaces": False,
    },
}


def made_up_text(seed: int) -> str:
    draw = random.Random(seed)
    return " ".join(draw.choice(WORDS) + draw.choice(["", ".", "\n", "  "]) for _ in range(40))


def sentencepiece_model(folder, options):
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=map(made_up_text, range(200)),
        model_prefix=str(folder / "tok"),
        vocab_size=400,
        model_type="bpe",
        hard_vocab_limit=False,
        pad_id=3,
        minloglevel=2,
        **options,
    )
    return ["--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", str(folder / "tok.model")]


def byte_level_bpe(folder):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<|endoftext|>"], show_progress=False, initial_alphabet=alphabet
    )
    tokenizer.train_from_iterator(map(made_up_text, range(200)), trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>").save_pretrained(folder)
    return ["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", str(folder)]


@pytest.fixture(scope="module", params=[*SENTENCEPIECE, "byte-level BPE"])
def pair(request, tmp_path_factory):
    """(Megatron's tokenizer, transformers' of the export, what was written)."""
    from transformers import AutoTokenizer

    folder, output = tmp_path_factory.mktemp("tokenizer"), tmp_path_factory.mktemp("export")
    options = SENTENCEPIECE.get(request.param)
    flags = byte_level_bpe(folder) if options is None else sentencepiece_model(folder, options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        written = tokenizer_files.write(flags, output)
        return tokenizer_files.megatron_tokenizer(flags), AutoTokenizer.from_pretrained(output), written


ANY = st.text(st.one_of(st.sampled_from("  \n\tab1.é日😀▁<>\x85\u3000"), st.characters(codec="utf-8")), max_size=60)


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(text=st.one_of(ANY, st.integers(200, 10**6).map(made_up_text)))
def test_any_text_has_megatrons_ids(pair, text):
    """Where tokenizers normalises, see NORMALIZES, any without characters that combine."""
    megatron, transformers, written = pair
    if written.doubt:
        text = "".join(char for char in text if char < "\u0300" or char in "日😀▁\u3000ﬁ①ｶΩя")
    assert transformers(text)["input_ids"] == list(megatron.tokenize(text))


@pytest.mark.parametrize("text", ["a<sep>b", "<sep>", " <sep> <sep>x", "<s>a</s>", "<unk>", "<pad> b"])
def test_the_text_of_special_tokens_has_megatrons_ids(pair, text):
    megatron, transformers, _ = pair
    assert transformers(text)["input_ids"] == list(megatron.tokenize(text))


def test_text_comes_back_as_from_megatron(pair):
    megatron, transformers, _ = pair
    for seed in range(20):
        ids = list(megatron.tokenize(made_up_text(seed)))
        assert transformers.decode(ids, clean_up_tokenization_spaces=False) == megatron.detokenize(ids)


def test_the_end_of_a_document_and_the_size_are_megatrons(pair):
    megatron, transformers, written = pair
    assert transformers.eos_token_id == megatron.eod == written.ids["eos_token_id"]
    assert len(transformers) == megatron.vocab_size == written.size


def test_rows_that_pad_the_vocabulary_are_not_drawn(pair):
    _, _, written = pair
    assert written.generation_config(written.size + 2)["suppress_tokens"] == [written.size, written.size + 1]


def test_symbols_with_a_dummy_prefix_are_refused_not_changed(tmp_path):
    """transformers would put the prefix after each of them too."""
    flags = sentencepiece_model(tmp_path, {"byte_fallback": True, "user_defined_symbols": ["<sep>"]})
    with pytest.raises(ValueError, match="in Megatron and .* in transformers: it can't be exported"):
        tokenizer_files.write(flags, tmp_path / "out")


def test_the_doubt_about_characters_that_combine_is_told(pair):
    megatron, transformers, written = pair
    differs = transformers("¸ऺ")["input_ids"] != list(megatron.tokenize("¸ऺ"))
    assert bool(written.doubt) == differs


@pytest.mark.parametrize("added", [False, True])
def test_whether_a_directory_has_the_ids_of_its_sentencepiece_model(tmp_path, added):
    """Tokens that were added to tokenizer.json alone are not lost."""
    from transformers import AutoTokenizer

    flags = sentencepiece_model(tmp_path, SENTENCEPIECE["ours"])
    (tmp_path / "out").mkdir()
    tokenizer_files.write(flags, tmp_path / "out")
    if added:
        written = AutoTokenizer.from_pretrained(tmp_path / "out")
        written.add_tokens(["<|user|>"])
        written.save_pretrained(tmp_path / "out")
    assert tokenizer_files.has_the_ids_of(tmp_path / "out", flags) == (not added)


def test_a_unigram_model_is_refused(tmp_path):
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=map(made_up_text, range(200)),
        model_prefix=str(tmp_path / "uni"),
        vocab_size=100,
        model_type="unigram",
        hard_vocab_limit=False,
        minloglevel=2,
    )
    flags = ["--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", str(tmp_path / "uni.model")]
    with pytest.raises(ValueError, match="no BPE can't be exported"):
        tokenizer_files.write(flags, tmp_path)
