"""Imported once by the fork server of `ranks`, so that every rank starts with Megatron already in memory."""

import os

# Ranks are CPU ranks on every machine, also where a GPU is there.
os.environ["CUDA_VISIBLE_DEVICES"] = ""

from hmoe_megatron import machine, patches  # noqa: E402

machine.prepare_environment()
patches.apply()

import megatron.core.tokenizers.text.text_tokenizer  # noqa: E402, F401  transformers behind it takes five seconds
import megatron.training.training  # noqa: E402, F401
import torch  # noqa: E402

import hmoe_megatron.data.batches  # noqa: E402, F401
import hmoe_megatron.moe.specs  # noqa: E402, F401
import hmoe_megatron.telemetry  # noqa: E402, F401
import hmoe_megatron.training  # noqa: E402, F401

torch.set_num_threads(1)
