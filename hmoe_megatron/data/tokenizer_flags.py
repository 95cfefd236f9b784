"""Megatron's flags of a tokenizer, without the rest of its flags."""

import argparse
import warnings
from pathlib import Path

from hmoe_megatron.untrusted import near

# Megatron's, so that a wrong word is seen before Megatron is imported.
TYPES = (
    "BertWordPieceLowerCase BertWordPieceCase GPT2BPETokenizer SentencePieceTokenizer GPTSentencePieceTokenizer "
    "HuggingFaceTokenizer Llama2Tokenizer TikTokenizer MultimodalTokenizer NullTokenizer NullMultimodalTokenizer "
    "SFTTokenizer"
).split()
_OF_A_FILE = ("SentencePieceTokenizer", "GPTSentencePieceTokenizer", "Llama2Tokenizer", "TikTokenizer")


def check_tokenizer_file(kind: str, model: str | None) -> None:
    """Raises ValueError for a type that is none, and for a file that is not there."""
    if kind not in TYPES:
        raise ValueError(f"--tokenizer-type {kind}: no such type{near(kind, TYPES)}; give one of {', '.join(TYPES)}")
    if kind in _OF_A_FILE and not (model and Path(model).is_file()):
        what = f"--tokenizer-model {model}: no such file" if model else "--tokenizer-model is missing"
        raise ValueError(f"{what}: give the file of the {kind}")


def tokenizer_parser(prog: str | None = None) -> argparse.ArgumentParser:
    """Of what Megatron's build_tokenizer reads, with its defaults."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from megatron.training.argument_utils import ArgumentGroupFactory
        from megatron.training.config import TokenizerConfig
    parser = argparse.ArgumentParser(prog=prog, allow_abbrev=False, add_help=False)
    ArgumentGroupFactory(TokenizerConfig).build_group(parser, "tokenizer")
    parser.set_defaults(pad_vocab_size=False)  # padding is the model's affair
    return parser
