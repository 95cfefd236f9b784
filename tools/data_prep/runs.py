"""One call of tools/preprocess_data.py: alone, as one shard of several, or as one process of mpirun."""

import argparse
import os
import time
from collections import Counter
from contextlib import ExitStack
from functools import cached_property
from pathlib import Path

from hmoe_megatron.data.tokenizer_flags import tokenizer_parser
from hmoe_megatron.files import file_hashes, sha256_file
from hmoe_megatron.tools.data_prep.encoding import Encoder
from hmoe_megatron.tools.data_prep.pipeline import fill, listing, sample_texts
from hmoe_megatron.tools.data_prep.publish import data_set_name, is_published, publish, quarantine_path
from hmoe_megatron.tools.data_prep.shard import Shard, folder_of
from hmoe_megatron.tools.data_prep.sources import Source, spans


def request_of(args: argparse.Namespace, megatron_flags: list[str], sources: list[Source]) -> dict:
    """All that decides the output's bytes, without what becomes of bad records. Inputs by size and time of change: to
    hash them would read all of them once more before work starts."""
    return {
        "inputs": [[source.path, source.bytes, os.stat(source.path).st_mtime_ns] for source in sources],
        "tokenizer": {
            "type": args.tokenizer_type,
            "model": args.tokenizer_model,
            "other_flags": megatron_flags,
            "sha256": file_hashes(args.tokenizer_model, args.vocab_file, args.merge_file),
        },
        "json_keys": args.json_keys,
        "append_eod": args.append_eod,
        "max_doc_bytes": args.max_doc_bytes,
        "sample_by": args.sample_by,
        "stock_tokenizer": args.stock_tokenizer,
    }


def published_request(request: dict, args: argparse.Namespace) -> dict:
    """The request as the sidecar has it: inputs by hash, and what became of bad records. The way to the ids is not in
    it, the ids are the same; but work that was begun one way does not go on another way: that one may have erred."""
    inputs = [{"path": path, "bytes": size, "sha256": sha256_file(path)} for path, size, _ in request["inputs"]]
    policy = {"on_bad_record": args.on_bad_record, "max_bad_records": args.max_bad_records}
    return {name: value for name, value in request.items() if name != "stock_tokenizer"} | {"inputs": inputs} | policy


def megatron_tokenizer_args(args: argparse.Namespace, flags: list[str]) -> argparse.Namespace:
    """What Megatron's build_tokenizer reads, from its own parser and defaults."""
    own = {
        "--tokenizer-type": args.tokenizer_type,
        "--tokenizer-model": args.tokenizer_model,
        "--vocab-file": args.vocab_file,
        "--merge-file": args.merge_file,
    }
    given = [word for flag, value in own.items() if value is not None for word in (flag, value)]
    return tokenizer_parser("preprocess_data.py").parse_args(given + flags)


class Run:
    """One call of the tool, in one process."""

    def __init__(self, args: argparse.Namespace, megatron_flags: list[str], sources: list[Source]):
        """Raises ValueError for a wrong flag or file."""
        self.args, self.sources, self.start_s = args, sources, time.monotonic()
        self.megatron_flags = megatron_flags
        self.request = request_of(args, megatron_flags, self.sources)

    @cached_property
    def tokenizer_args(self) -> argparse.Namespace:
        """Imports Megatron: not asked for where all is done, or only to be merged."""
        return megatron_tokenizer_args(self.args, self.megatron_flags)

    def is_done(self, shards: int = 1) -> bool:
        """Whether this very command has made the data sets, whole; removes what it left of the shards."""
        args = self.args
        if not any(Path(f"{data_set_name(args.output_prefix, key)}.idx").exists() for key in args.json_keys):
            return False
        if not is_published(args.output_prefix, args.json_keys, published_request(self.request, args)):
            return False
        for number in range(shards):
            if folder_of(args.output_prefix, number, shards).exists():
                self.open_shard(number, shards).remove()
        print(f"{args.output_prefix}: made by this very command before, whole; nothing done")
        return True

    def open_shard(self, number: int, shards: int) -> Shard:
        folder = folder_of(self.args.output_prefix, number, shards)
        return Shard(folder, len(self.args.json_keys), self.request, self.args.on_bad_record)

    def fill(self, shard: Shard, number: int, shards: int) -> None:
        """Raises ValueError for a wrong file or record."""
        args = self.args
        if shard.progress.is_done:
            return
        is_quiet = number > 0
        if shard.is_resumed and not is_quiet:
            print(f"going on after {shard.progress.records:,} records that are done")
        sample = None if args.stock_tokenizer else sample_texts(self.sources, args.json_keys, args.max_doc_bytes)
        encoder_args = (self.tokenizer_args, args.json_keys, args.append_eod, args.max_doc_bytes, sample)
        encoder = Encoder(*encoder_args)
        if not is_quiet:
            print(f"tokenizer: {encoder.way_name}")
        fill(
            shard,
            spans(self.sources, number, shards),
            encoder,
            encoder_args,
            workers=args.workers,
            on_bad_record=args.on_bad_record,
            max_bad_records=args.max_bad_records,
            is_quiet=is_quiet,
        )
        if request_of(args, self.request["tokenizer"]["other_flags"], self.sources) != self.request:
            raise ValueError(
                f"--input {' '.join(args.input)}: changed while it was read; remove {shard.folder} and run again"
            )

    def publish(self, shards: int) -> None:
        """Joins `shards` finished ones. Raises ValueError if one is not, or no document is there."""
        args = self.args
        missing = [
            f"{number}/{shards}"
            for number in range(shards)
            if not folder_of(args.output_prefix, number, shards).is_dir()
        ]
        if missing:
            raise ValueError(f"--merge {shards}: nothing is there of --shard {', '.join(missing[:8])}: run it first")
        with ExitStack() as stack:
            opened = []
            for number in range(shards):
                opened.append(self.open_shard(number, shards))
                stack.callback(opened[-1].close)
                if not opened[-1].progress.is_done:
                    raise ValueError(f"--merge {shards}: --shard {number}/{shards} is not finished; run it again")
            bad = sum((shard.bad for shard in opened), Counter())
            if args.max_bad_records is not None and bad.total() > args.max_bad_records:
                raise ValueError(f"more than --max-bad-records {args.max_bad_records} in all shards ({listing(bad)})")
            if not sum(shard.progress.documents for shard in opened):
                raise ValueError(
                    f"--input {' '.join(args.input)}: no document in "
                    f"{sum(shard.progress.records for shard in opened)} records ({listing(bad)}); "
                    f"remove {opened[0].folder} to start again"
                )
            counts = publish(args.output_prefix, args.json_keys, opened, published_request(self.request, args))
        for key, tokens in zip(args.json_keys, counts["tokens"], strict=True):
            print(f"{data_set_name(args.output_prefix, key)}: {counts['documents']:,} documents, {tokens:,} tokens")
        kept = quarantine_path(args.output_prefix)
        where = f", kept in {kept}" if kept.exists() else ""
        print(f"bad records: {listing(counts['bad_records'])}{where}; {time.monotonic() - self.start_s:.1f} s")


def run_alone(args: argparse.Namespace, megatron_flags: list[str], sources: list[Source]) -> None:
    """Raises ValueError for a wrong flag, file or record."""
    work = Run(args, megatron_flags, sources)
    if args.merge:
        if not work.is_done(args.merge):
            work.publish(args.merge)
        return
    number, shards = args.shard or (0, 1)
    if not args.shard and work.is_done():
        return
    _ = work.tokenizer_args  # a wrong flag ends it before a folder is made
    shard = work.open_shard(number, shards)
    try:
        work.fill(shard, number, shards)
        records, documents = shard.progress.records, shard.progress.documents
    finally:
        shard.close()
    if args.shard:
        print(
            f"--shard {number}/{shards}: {documents:,} documents of {records:,} records are in {shard.folder}; "
            f"when all shards are done: --merge {shards}"
        )
    else:
        work.publish(1)


def run_under_mpi(args: argparse.Namespace, megatron_flags: list[str], sources: list[Source], world) -> None:
    """Each process fills a shard, the first merges them. Raises ValueError on every process if one failed."""
    error, work = None, None
    try:
        work = Run(args, megatron_flags, sources)
        is_done = world.rank == 0 and work.is_done(world.size)
    except ValueError as found:
        error, is_done = found, False
    if any(world.allgather(is_done)):
        return
    errors = world.allgather(str(error or ""))
    if not any(errors):
        try:
            _ = work.tokenizer_args
            shard = work.open_shard(world.rank, world.size)
            try:
                work.fill(shard, world.rank, world.size)
            finally:
                shard.close()
        except ValueError as found:
            error = found
        errors = world.allgather(str(error or ""))
    if found := sorted({text for text in errors if text}):
        raise ValueError("\n".join(found) if world.rank == 0 else "")
    if world.rank == 0:
        work.publish(world.size)
