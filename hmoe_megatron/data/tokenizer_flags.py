"""Megatron's flags of a tokenizer, without the rest of its flags."""

import argparse
import warnings


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
