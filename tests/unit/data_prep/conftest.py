from pathlib import Path

import pytest

from hmoe_megatron.tools.data_prep import sources
from tests.unit.data_prep.calls import SP_VOCAB_SIZE, make_texts, write_jsonl


def pytest_collection_modifyitems(items):
    for item in items:  # of the whole session
        if Path(__file__).parent in item.path.parents:  # pytest's threads are idle
            item.add_marker(pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning"))


@pytest.fixture(scope="session")
def sp_model(tmp_path_factory) -> Path:
    import train_tokenizer

    folder = tmp_path_factory.mktemp("tokenizer")
    corpus = write_jsonl(folder / "train.jsonl", make_texts(300))
    argv = ["--input", str(corpus), "--vocab-size", str(SP_VOCAB_SIZE), "--output", str(folder / "tok")]
    assert train_tokenizer.main(argv) == 0
    return folder / "tok.model"


@pytest.fixture(scope="session")
def bpe_folder(tmp_path_factory) -> Path:
    """A byte-level BPE of Hugging Face's, with an added token."""
    return make_bpe(tmp_path_factory.mktemp("bpe"))


def make_bpe(folder: Path, normalizer=None, pre_tokenizer=None) -> Path:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizer or pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if normalizer:
        tokenizer.normalizer = normalizer
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=["<|endoftext|>"],
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(make_texts(300), trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>").save_pretrained(folder)
    return folder


@pytest.fixture
def small_blocks(monkeypatch):
    """Many blocks of little text."""
    monkeypatch.setattr(sources, "BLOCK_BYTES", 500)
