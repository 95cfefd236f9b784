"""The data that a run is to read: whole, and of the run's tokenizer, before it is read."""

import argparse

from hmoe_megatron.data.data_set import DataSet
from hmoe_megatron.data.splits import check_splits, given_prefixes
from hmoe_megatron.data.tokenizer_flags import check_tokenizer_file
from hmoe_megatron.files import file_hashes


def data_sets(args: argparse.Namespace) -> list[DataSet]:
    """Those that --data-path and its kin name on this disk, each once; none with --sft, whose files are text."""
    if args.mock_data or args.sft:
        return []
    return [DataSet(prefix) for prefix in given_prefixes(args) if "://" not in prefix]


def data_is_here(args: argparse.Namespace) -> bool:
    """Whether any file of the data is on this machine, or none is named."""
    found = data_sets(args)
    return not found or any(data.idx.exists() or data.bin.exists() for data in found)


def check_data(args: argparse.Namespace) -> None:
    """Lengths of all files, the tokenizer where a sidecar names one, and that each split has what it will read.

    Raises ValueError.
    """
    check_tokenizer_file(args.tokenizer_type, args.tokenizer_model)
    if args.sft:
        from hmoe_megatron.data.conversations import check_conversations  # Megatron is slow to import

        check_conversations(args)
        return
    found = data_sets(args)
    flags = f"--tokenizer-type {args.tokenizer_type}"
    if args.tokenizer_model:
        flags += f" --tokenizer-model {args.tokenizer_model}"
    hashes = list(file_hashes(args.tokenizer_model, args.vocab_file, args.merge_file).values())
    for data in found:
        if sidecar := data.check_lengths():
            data.check_tokenizer(sidecar, args.tokenizer_type, hashes, flags)
    check_splits(args)


def verify_data(args: argparse.Namespace, rank: int, ranks: int) -> None:
    """This rank's share of the hashes. Raises ValueError."""
    for number, data in enumerate(data_sets(args)):
        if number % ranks == rank:
            data.check_hashes()
