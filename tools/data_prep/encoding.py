"""Blocks to token ids, in the input's order, by any tokenizer of Megatron's and any number of processes."""

import argparse
import multiprocessing
import os
import signal
import sys
import warnings
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import NamedTuple

import numpy as np

from hmoe_megatron.child_process import end_with_parent
from hmoe_megatron.data.data_set import smallest_dtype
from hmoe_megatron.tools.data_prep.fast_encoding import find_way, megatron_way
from hmoe_megatron.tools.data_prep.records import Bad, BadRecord, count_lines, parse_block, raw_text
from hmoe_megatron.tools.data_prep.sources import Block

BLOCKS_IN_FLIGHT_A_WORKER = 3
SAMPLE_CHARS = 1 << 18
SPOT_CHECK_CHARS = 4096


class Encoded(NamedTuple):
    """A block's documents. ids: an array a key, all documents behind each other, in the data set's dtype; lengths: an
    int32 array a key; line: of the source, from 0 at the block's start, by how much it goes on."""

    ids: list[np.ndarray]
    lengths: list[np.ndarray]
    bad: list[Bad]
    lines: int


class Encoder:
    """Block to Encoded. way: how texts become ids, equal to Megatron's own way: see fast_encoding.py."""

    def __init__(
        self,
        tokenizer_args: argparse.Namespace,
        keys: list[str],
        append_eod: bool,
        max_record_bytes: int,
        sample: list[str] | None,
    ):
        """sample: texts of the input on which a faster way must be equal; None: Megatron's own way.

        Raises ValueError if Megatron cannot build the tokenizer or it lacks what is asked of it.
        """
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # Hugging Face's threads do not survive a fork
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer
        try:
            self.tokenizer = build_tokenizer(tokenizer_args)
            self.vocab_size = int(self.tokenizer.vocab_size)
            self.eod_id = self.tokenizer.eod if append_eod else None
        except Exception as error:  # each library behind build_tokenizer raises its own
            flags = f"--tokenizer-type {tokenizer_args.tokenizer_type}"
            if tokenizer_args.tokenizer_model:
                flags += f" --tokenizer-model {tokenizer_args.tokenizer_model}"
            raise ValueError(
                f"{flags}: Megatron cannot build it ({type(error).__name__}: {error}); give a whole one of that type"
            ) from error
        if append_eod and (self.eod_id is None or not 0 <= self.eod_id < self.vocab_size):
            raise ValueError(
                f"--append-eod: the tokenizer's end-of-document id {self.eod_id} is not in its vocabulary of "
                f"{self.vocab_size}; train it with an eos id or leave --append-eod out"
            )
        self.keys, self.max_record_bytes, self.dtype = keys, max_record_bytes, smallest_dtype(self.vocab_size)
        self.stock = megatron_way(self.tokenizer)
        self.way_name, self.way = "Megatron's tokenizer, text by text", self.stock
        if sample is not None:
            self.way_name, self.way = find_way(self.tokenizer, sample, self.stock)
        self.about = {
            "tokenizer_way": self.way_name,
            "vocab_size": self.vocab_size,
            "eod_id": self.eod_id,
            "dtype": self.dtype.__name__,
        }

    def encode(self, block: Block, kind: str) -> Encoded:
        """kind: of the block's source. Raises ValueError if the faster way fails its spot check."""
        good, bad = [], []
        for record in parse_block(block, kind, self.keys, self.max_record_bytes):
            (bad if isinstance(record, Bad) else good).append(record)
        ids_of_documents = zip(
            *(self._encode_texts([record.texts[key] for record in good]) for key in range(len(self.keys))), strict=True
        )
        kept = []
        for record, ids_of_keys in zip(good, ids_of_documents, strict=True):
            try:
                kept.append([self._checked(ids) for ids in ids_of_keys])
            except BadRecord as wrong:
                bad.append(Bad(record.line, wrong.kind, wrong.detail, raw_text(record.raw, self.keys)))
        by_key = list(zip(*kept, strict=True)) or [()] * len(self.keys)
        lengths = [np.array([len(ids) for ids in arrays], dtype=np.int32) for arrays in by_key]
        ids = [np.concatenate(arrays) if arrays else np.zeros(0, self.dtype) for arrays in by_key]
        return Encoded(ids, lengths, sorted(bad), count_lines(block, kind))

    def _encode_texts(self, texts: list[str]) -> list[np.ndarray | Exception]:
        try:
            found = self.way(texts)
        except MemoryError:
            raise
        except Exception:  # one of them; which one?
            return [self._encode_alone(text) for text in texts]
        if self.way is not self.stock:
            at = next((at for at, text in enumerate(texts) if len(text) <= SPOT_CHECK_CHARS), None)
            if at is not None and not np.array_equal(found[at], self._encode_alone(texts[at])):
                raise ValueError(f"{self.way_name}: but not on {texts[at][:60]!r}; start again with --stock-tokenizer")
        return found

    def _encode_alone(self, text: str) -> np.ndarray | Exception:
        try:
            return self.stock([text])[0]
        except MemoryError:
            raise
        except Exception as error:
            return error

    def _checked(self, ids: np.ndarray | Exception) -> np.ndarray:
        """The ids in the data set's dtype, the end of the document behind them. Raises BadRecord."""
        if isinstance(ids, Exception):
            raise BadRecord("tokenizer_error", f"{type(ids).__name__}: {ids}")
        if len(ids) == 0:
            raise BadRecord("no_tokens", "the tokenizer makes no token of it")
        lowest, highest = ids.min(), ids.max()
        if lowest < 0 or highest >= self.vocab_size:
            wrong = lowest if lowest < 0 else highest
            raise BadRecord("id_out_of_range", f"id {wrong} is not in a vocabulary of {self.vocab_size}")
        return ids.astype(self.dtype) if self.eod_id is None else np.append(ids, self.eod_id).astype(self.dtype)


_encoder: Encoder | None = None  # of a worker process


def _start_worker(*encoder_args) -> None:
    """The worker's tokenizer: what a fork inherits, else built. Ends the worker when the main process is gone."""
    global _encoder
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the main process stops the pool
    end_with_parent()
    if _encoder is None:
        _encoder = Encoder(*encoder_args)


def _encode(block: Block, kind: str) -> Encoded:
    return _encoder.encode(block, kind)


def encode_in_order(blocks: Iterable[tuple], encoder: Encoder, encoder_args: tuple, workers: int) -> Iterator[tuple]:
    """(what came with it, block, Encoded) for each (what came with it, block, its source's kind), in their order, with
    a bounded number of blocks in flight.

    One worker means this process. Raises BrokenProcessPool if a worker dies.
    """
    global _encoder
    if workers == 1:
        for mark, block, kind in blocks:
            yield mark, block, encoder.encode(block, kind)
        return
    _encoder = encoder
    # A fork saves each worker the import of Megatron, some 10 s.
    method = "fork" if sys.platform == "linux" else "spawn"
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context(method), _start_worker, encoder_args)
    in_flight = deque()
    try:
        for mark, block, kind in blocks:
            in_flight.append((mark, block._replace(data=b""), pool.submit(_encode, block, kind)))
            if len(in_flight) > BLOCKS_IN_FLIGHT_A_WORKER * workers:
                mark, done, result = in_flight.popleft()
                yield mark, done, result.result()
        while in_flight:
            mark, done, result = in_flight.popleft()
            yield mark, done, result.result()
    finally:
        pool.shutdown(cancel_futures=True)
        _encoder = None
