"""Megatron's .idx, written from a file of lengths in bounded memory.

Megatron's IndexedDatasetBuilder keeps a Python list entry a document until it is finalized; 100 million documents are
gigabytes. The format is megatron.core.datasets.indexed_dataset's: magic, version, dtype, number of sequences and of
document borders; then sequence lengths (int32), their offsets in bytes (int64), document borders (int64). Here each
sequence is a document.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from hmoe_megatron.data.data_set import DTYPES, HEADER, MAGIC, VERSION

PIECE = 1 << 18  # documents at a time


def write_index(path: str | Path, length_files: Sequence[Path], dtype: type) -> tuple[int, int]:
    """Writes the index of documents whose lengths stand in `length_files`, int32 each, behind each other.

    Returns (documents, tokens).
    """
    item_bytes = np.dtype(dtype).itemsize
    code = next(code for code, known in DTYPES.items() if known is dtype)
    documents = sum(file.stat().st_size for file in length_files) // 4
    with open(path, "wb") as file:
        file.write(HEADER.pack(MAGIC, VERSION, code, documents, documents + 1))
        for lengths in _pieces(length_files):
            file.write(lengths.tobytes())
        tokens = 0
        for lengths in _pieces(length_files):
            ends = np.cumsum(lengths, dtype=np.int64) + tokens
            starts = np.concatenate([[tokens], ends[:-1]])
            file.write((starts * item_bytes).tobytes())
            tokens = int(ends[-1])
        for start in range(0, documents + 1, PIECE):
            file.write(np.arange(start, min(start + PIECE, documents + 1), dtype=np.int64).tobytes())
    return documents, tokens


def _pieces(files: Sequence[Path]):
    for path in files:
        with open(path, "rb") as file:
            while len(data := np.fromfile(file, dtype=np.int32, count=PIECE)):
                yield data
