"""Imported once by the fork server of `ranks`, so that every rank starts with Megatron already in memory."""

import argparse
import functools
import gc
import os
import sys

# Ranks are CPU ranks on every machine, also where a GPU is there.
os.environ["CUDA_VISIBLE_DEVICES"] = ""
sys.modules["wandb"] = None  # as if it were not installed: imported, it sees every line that a rank prints

from hmoe_megatron import machine, patches  # noqa: E402

machine.prepare_environment()
patches.apply()

import megatron.core.tokenizers.text.text_tokenizer  # noqa: E402, F401  transformers behind it takes five seconds
import megatron.training.training  # noqa: E402, F401
import torch  # noqa: E402
from megatron.core.datasets.gpt_dataset import MockGPTLowLevelDataset  # noqa: E402

import hmoe_megatron.data.batches  # noqa: E402, F401
import hmoe_megatron.moe.specs  # noqa: E402, F401
import hmoe_megatron.nan_guard.guard  # noqa: E402, F401
import hmoe_megatron.telemetry  # noqa: E402, F401
import hmoe_megatron.training  # noqa: E402, F401

torch.set_num_threads(1)
MOCK_DOCUMENTS = MockGPTLowLevelDataset.size  # of --mock-data: to shuffle them takes as long as some steps
MockGPTLowLevelDataset.size = 500


def _read_docstrings_once() -> None:
    """Megatron parses the source of its dataclasses for the help of its flags: a fifth of a second in every rank."""
    from megatron.training import arguments
    from megatron.training.argument_utils import ArgumentGroupFactory

    stock = ArgumentGroupFactory._get_field_docstrings
    read = functools.cache(lambda of: stock(object.__new__(ArgumentGroupFactory), of))
    ArgumentGroupFactory._get_field_docstrings = lambda self, of: read(of)
    arguments.add_megatron_arguments(argparse.ArgumentParser())


_read_docstrings_once()
gc.freeze()  # a rank does not look through all that is imported, nor copies its pages for that
