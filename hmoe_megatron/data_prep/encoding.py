"""Lines to token ids, in the input's order, by any tokenizer of Megatron's and any number of processes."""

import argparse
import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
import threading
import warnings
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import NamedTuple

import numpy as np

from hmoe_megatron.data_prep.records import BadRecord, parse_record, read_lines

CHUNK_BYTES = 256 << 10
CHUNKS_IN_FLIGHT_A_WORKER = 3


class Line(NamedTuple):
    """Line `number`, from 1, of input file `path`; `text` is cut if the line is too long."""

    path: str
    number: int
    text: bytes
    is_too_long: bool


class Bad(NamedTuple):
    """A line of the quarantine: raw.encode("utf-8", "surrogateescape") gives the input line's bytes back."""

    file: str
    line: int
    reason: str
    detail: str
    raw: str


class Encoder:
    """Line to one array of token ids a key, in the data set's dtype; or a Bad."""

    def __init__(self, tokenizer_args: argparse.Namespace, keys: list[str], append_eod: bool):
        """Raises ValueError if Megatron cannot build the tokenizer or it lacks what is asked of it."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from megatron.core.datasets.indexed_dataset import DType
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
        self.keys, self.dtype = keys, DType.optimal_dtype(self.vocab_size)

    def encode(self, line: Line) -> list[np.ndarray] | Bad:
        try:
            if line.is_too_long:
                raise BadRecord("too_long", "longer than --max-doc-bytes; the start of the line follows")
            return [self._ids(text) for text in parse_record(line.text, self.keys)]
        except BadRecord as bad:
            raw = line.text.decode("utf-8", "surrogateescape")
            return Bad(line.path, line.number, bad.kind, bad.detail, raw)

    def _ids(self, text: str) -> np.ndarray:
        try:
            ids = self.tokenizer.tokenize(text)
        except MemoryError:
            raise
        except Exception as error:
            raise BadRecord("tokenizer_error", f"{type(error).__name__}: {error}") from error
        if len(ids) == 0:
            raise BadRecord("no_tokens", "the tokenizer makes no token of it")
        if min(ids) < 0 or max(ids) >= self.vocab_size:
            wrong = min(ids) if min(ids) < 0 else max(ids)
            raise BadRecord("id_out_of_range", f"id {wrong} is not in a vocabulary of {self.vocab_size}")
        return np.array([*ids, self.eod_id] if self.eod_id is not None else ids, dtype=self.dtype)


_encoder: Encoder | None = None  # of a worker process


def _start_worker(*encoder_args) -> None:
    """Builds the worker's tokenizer, and ends the worker when the main process is gone, however it went."""
    global _encoder
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the main process stops the pool
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    _encoder = Encoder(*encoder_args)


def _exit_with_parent() -> None:
    multiprocessing.connection.wait([multiprocessing.parent_process().sentinel])
    os._exit(1)


def _encode_chunk(chunk: list[Line]) -> list[list[np.ndarray] | Bad]:
    return [_encoder.encode(line) for line in chunk]


def read_chunks(paths: list[str], max_doc_bytes: int) -> Iterator[list[Line]]:
    """Lines of all files in order, in lists of about CHUNK_BYTES."""
    chunk, size = [], 0
    for path in paths:
        for line in read_lines(path, max_doc_bytes):
            chunk.append(Line(path, *line))
            size += len(line[1]) + 1
            if size >= CHUNK_BYTES:
                yield chunk
                chunk, size = [], 0
    if chunk:
        yield chunk


def encode_in_order(
    chunks: Iterable[list[Line]], encoder: Encoder, encoder_args: tuple, workers: int
) -> Iterator[list[list[np.ndarray] | Bad]]:
    """Yields the results of each chunk in the order of `chunks`, with a bounded number of chunks in flight.

    One worker means this process. Raises BrokenProcessPool if a worker dies.
    """
    if workers == 1:
        for chunk in chunks:
            yield [encoder.encode(line) for line in chunk]
        return
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # Hugging Face's threads do not survive a fork
    # A fork saves each worker the import of Megatron, some 10 s.
    method = "fork" if sys.platform == "linux" else "spawn"
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context(method), _start_worker, encoder_args)
    in_flight = deque()
    try:
        for chunk in chunks:
            in_flight.append(pool.submit(_encode_chunk, chunk))
            if len(in_flight) > CHUNKS_IN_FLIGHT_A_WORKER * workers:
                yield in_flight.popleft().result()
        while in_flight:
            yield in_flight.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
