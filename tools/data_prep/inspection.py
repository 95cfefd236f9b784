"""Counts and lengths of a data set, read in pieces."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hmoe_megatron.data.data_set import AGAIN, DataSet

PIECE_ITEMS = 1 << 22
BINS = 12
COLOUR = "#3b6ea5"


@dataclass(frozen=True)
class Summary:
    """histogram: (lowest, highest, how many sequences) of lengths, in bins that grow by a factor."""

    documents: int
    sequences: int
    tokens: int
    dtype: type
    lowest_id: int
    highest_id: int
    shortest: int
    longest: int
    mean: float
    median: float
    histogram: list[tuple[int, int, int]]


def summarise(data: DataSet, sidecar: dict | None) -> Summary:
    """Reads all ids. Raises ValueError for a data set without a token, ids or counts other than the sidecar's."""
    dtype, sequences, borders = data.header()
    lengths, _, _ = data.arrays()
    if not data.bin.stat().st_size:
        raise ValueError(f"{data.bin}: holds no token; {AGAIN}")
    lowest, highest = _range_of_ids(data, dtype)
    edges = bin_edges(int(lengths.min()), int(lengths.max()))
    counts, _ = np.histogram(lengths, bins=[*edges, edges[-1] + 1])
    summary = Summary(
        documents=borders - 1,
        sequences=sequences,
        tokens=int(lengths.sum(dtype=np.int64)),
        dtype=dtype,
        lowest_id=lowest,
        highest_id=highest,
        shortest=int(lengths.min()),
        longest=int(lengths.max()),
        mean=float(lengths.mean()),
        median=float(np.median(lengths)),
        histogram=[(low, high - 1, int(count)) for low, high, count in zip(edges, edges[1:], counts, strict=False)],
    )
    if sidecar:
        _check_against(data, sidecar, summary)
    return summary


def bin_edges(shortest: int, longest: int) -> list[int]:
    """From the shortest to beyond the longest, each about the same factor apart."""
    grown = np.geomspace(max(shortest, 1), longest + 1, BINS + 1)
    return sorted({shortest, *(int(round(edge)) for edge in grown[1:-1]), longest + 1})


def _range_of_ids(data: DataSet, dtype: type) -> tuple[int, int]:
    ids = np.memmap(data.bin, dtype=dtype, mode="r")
    pieces = [ids[at : at + PIECE_ITEMS] for at in range(0, len(ids), PIECE_ITEMS)]
    return int(min(piece.min() for piece in pieces)), int(max(piece.max() for piece in pieces))


def _check_against(data: DataSet, sidecar: dict, summary: Summary) -> None:
    counts, vocab_size = sidecar["counts"], sidecar["vocab_size"]
    said = (counts["documents"], counts["tokens"])
    if said != (summary.documents, summary.tokens):
        raise ValueError(
            f"{data.prefix}: holds {summary.documents:,} documents of {summary.tokens:,} tokens, its "
            f"sidecar says {said[0]:,} of {said[1]:,}; {AGAIN}"
        )
    if summary.lowest_id < 0 or summary.highest_id >= vocab_size:
        raise ValueError(
            f"{data.bin}: ids from {summary.lowest_id} to {summary.highest_id} are not all in a "
            f"vocabulary of {vocab_size}; {AGAIN}"
        )


def read_document(data: DataSet, number: int) -> np.ndarray:
    """The ids of one document."""
    dtype, _, _ = data.header()
    lengths, offsets, borders = data.arrays()
    first, last = borders[number : number + 2]
    start = int(offsets[first]) if first < last else 0
    return np.fromfile(data.bin, dtype=dtype, count=int(lengths[first:last].sum()), offset=start)


def draw_lengths(data: DataSet, summary: Summary, path: Path) -> None:
    """A PNG of the histogram, written whole."""
    import io

    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    from hmoe_megatron.files import atomic_write

    figure, axes = pyplot.subplots(figsize=(8, 4.5), dpi=120)
    lows, highs, counts = zip(*summary.histogram, strict=True)
    axes.bar(range(len(counts)), counts, width=0.9, color=COLOUR)
    axes.set_xticks(
        range(len(counts)), [f"{low:,} to\n{high:,}" for low, high in zip(lows, highs, strict=True)], fontsize=7
    )
    axes.set_xlabel("tokens a sequence")
    axes.set_ylabel("sequences")
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title(
        f"{Path(data.prefix).name}: {summary.sequences:,} sequences, {summary.tokens:,} tokens, "
        f"median {summary.median:,.0f}",
        fontsize=10,
    )
    figure.tight_layout()
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    pyplot.close(figure)
    atomic_write(path, picture.getvalue())
