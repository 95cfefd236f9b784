"""Inputs to one shard: read, encode, account for every record, commit."""

import contextlib
import functools
from collections.abc import Iterator
from itertools import islice

from tqdm import tqdm

from hmoe_megatron.tools.data_prep.encoding import SAMPLE_CHARS, Encoder, encode_in_order
from hmoe_megatron.tools.data_prep.records import Bad, Good, parse_block
from hmoe_megatron.tools.data_prep.shard import Shard
from hmoe_megatron.tools.data_prep.sources import Block, Source, Span, line_number, read_blocks

SAMPLED_FILES = 8


def sample_texts(sources: list[Source], keys: list[str], max_record_bytes: int) -> list[str]:
    """Texts from the start of up to SAMPLED_FILES of the inputs, together about SAMPLE_CHARS."""
    texts = []
    for source in sources[:: -(-len(sources) // SAMPLED_FILES)]:
        left = SAMPLE_CHARS // min(len(sources), SAMPLED_FILES)
        for block in islice(read_blocks(Span(source, 0, None), keys, max_record_bytes), 4):
            for record in parse_block(block, source.kind, keys, max_record_bytes):
                if isinstance(record, Good) and left > 0:
                    texts += record.texts
                    left -= sum(map(len, record.texts))
    return texts


def listing(bad: dict[str, int]) -> str:
    return ", ".join(f"{kind} {count}" for kind, count in sorted(bad.items())) or "no bad record"


def fill(
    shard: Shard,
    spans: list[Span],
    encoder: Encoder,
    encoder_args: tuple,
    *,
    workers: int,
    on_bad_record: str,
    max_bad_records: int | None,
    is_quiet: bool = False,
) -> None:
    """Encodes what of `spans` is not in `shard` yet. Raises ValueError for a record that the policy does not let pass;
    what comes before its block is kept, so the work can go on under another policy."""
    shard.progress.tokenizer = encoder.about
    results = encode_in_order(_blocks(shard, spans, encoder), encoder, encoder_args, workers)
    ends = [0]
    for span in spans:
        ends.append(ends[-1] + span.read_bytes)
    with contextlib.closing(results), tqdm(total=ends[-1], unit="B", unit_scale=True, disable=is_quiet or None) as bar:
        for number, block, encoded in results:
            shard.enter(number)
            try:
                _judge(encoded.bad, spans[number], shard, on_bad_record, max_bad_records)
            except ValueError:
                shard.commit()
                raise
            kept = encoded.bad if on_bad_record == "quarantine" else []
            shard.add(encoded, [_located(bad, spans[number], shard) for bad in kept], block.end)
            bar.set_postfix(_rates(shard, bar), refresh=False)
            bar.update(ends[number] + block.read_bytes - bar.n)
    shard.commit(is_done=True)


def _blocks(shard: Shard, spans: list[Span], encoder: Encoder) -> Iterator[tuple[int, Block, str]]:
    """(number of the span, block, kind of its source) of all that is not done."""
    begun, offset = shard.progress.span, shard.progress.offset
    for number, span in enumerate(spans[begun:], start=begun):
        start = offset if number == begun else None
        for block in read_blocks(span, encoder.keys, encoder.max_record_bytes, start):
            yield number, block, span.source.kind


def _located(bad: Bad, span: Span, shard: Shard) -> dict:
    """A line of the quarantine; for a span in the middle of a file this counts the lines before it."""
    line = _first_line(span) + shard.progress.line + bad.line
    return {"file": span.source.path, **bad._asdict(), "line": line}


@functools.cache
def _first_line(span: Span) -> int:
    return line_number(span.source, span.start)


def _judge(bad: list[Bad], span: Span, shard: Shard, on_bad_record: str, max_bad_records: int | None) -> None:
    """Raises ValueError for the first record too many."""
    if not bad:
        return
    allowed = 0 if on_bad_record == "stop" else max_bad_records
    if allowed is None or shard.bad.total() + len(bad) <= allowed:
        return
    first = _located(bad[allowed - shard.bad.total()], span, shard)
    where = f"{first['file']}:{first['line']}: {first['reason']}: {first['detail']}"
    remedy = f"correct the record or give --on-bad-record skip or quarantine: the work done is kept in {shard.folder}"
    if on_bad_record != "stop":
        remedy = f"that is one more than --max-bad-records {max_bad_records} ({listing(shard.bad)} before this block)"
    raise ValueError(f"{where}; {remedy}")


def _rates(shard: Shard, bar: tqdm) -> dict[str, str]:
    seconds = max(bar.format_dict["elapsed"], 1e-9)
    documents = shard.progress.documents - shard.documents_before
    tokens = sum(shard.progress.tokens) - shard.tokens_before
    return {"docs/s": f"{documents / seconds:,.0f}", "tokens/s": f"{tokens / seconds:,.0f}", "bad": shard.bad.total()}
