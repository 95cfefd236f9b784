"""Conversations of --sft: JSON Lines of {"messages": [{"role": ..., "content": ...}, ...]}, packed into sequences.

Megatron's data set packs and makes the labels. Two things are ours: the files are read without the `datasets` library,
which would copy them to the user's cache; and conversations of a sequence are kept apart by a mask, which Megatron's
own attention takes, in place of lengths, which only Transformer Engine's does.
Legend: B samples of a micro-batch, S sequence length.
"""

import argparse
import functools
import json
from pathlib import Path

import torch
from megatron.training.datasets.sft_dataset import SFTDataset

from hmoe_megatron.data.splits import given_prefixes

MAX_LINE_BYTES = 1 << 24
ROLES = ("system", "user", "assistant", "tool")


class Conversations(SFTDataset):
    """Megatron's data set of conversations, of files that `read_conversations` reads."""

    @staticmethod
    def build_low_level_dataset(dataset_path: str, config) -> list[list[dict]]:
        return read_conversations(Path(dataset_path))


@functools.cache
def read_conversations(path: Path) -> list[list[dict]]:
    """The messages of each line; read once, for the check and the data set. Raises ValueError with file, line and
    remedy."""
    conversations = []
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(iter(lambda: file.readline(MAX_LINE_BYTES), b""), 1):
                try:
                    conversations += [_messages(line)] if line.strip() else []
                except ValueError as error:
                    raise ValueError(f"{path}:{number}: {error}") from None
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}: give the .jsonl file of conversations (--sft)") from None
    if not conversations:
        raise ValueError(f"{path}: no conversation is in it")
    return conversations


def _messages(line: bytes) -> list[dict]:
    if len(line) == MAX_LINE_BYTES:
        raise ValueError(f"longer than {MAX_LINE_BYTES} bytes: split it")
    try:
        messages = json.loads(line)["messages"]
        fields = [(message["role"], message["content"]) for message in messages]
    except (ValueError, TypeError, KeyError, RecursionError):
        fields = []
    if not fields or any(type(content) is not str or role not in ROLES for role, content in fields):
        raise ValueError(
            f'give {{"messages": [{{"role": ..., "content": ...}}, ...]}}, roles of {", ".join(ROLES)}, text as content'
        )
    for before, (role, content) in zip((None, *fields), fields, strict=False):
        if role == "assistant" and (not content or before is None or before[0] not in ("user", "tool")):
            raise ValueError("an answer of the assistant is empty, or follows no message of the user or of a tool")
    return messages


def check_conversations(args: argparse.Namespace) -> None:
    """Every file that a run with --sft names. Raises ValueError."""
    for path in given_prefixes(args):
        read_conversations(Path(path))


def mask_of(cu_seqlens_BN: torch.Tensor, length: int) -> torch.Tensor:
    """Megatron's attention mask, bool [B, 1, S, S], True where a position (third) must not see another (fourth): a
    later one, or one of another conversation. cu_seqlens_BN: where conversations end, after a first 0, filled up with
    S."""
    place_S = torch.arange(length, device=cu_seqlens_BN.device)
    number_BS = torch.searchsorted(cu_seqlens_BN.contiguous(), place_S.expand(len(cu_seqlens_BN), -1), right=True)
    apart_BSS = number_BS.unsqueeze(2) != number_BS.unsqueeze(1)
    return (apart_BSS | (place_S.unsqueeze(1) < place_S)).unsqueeze(1)
