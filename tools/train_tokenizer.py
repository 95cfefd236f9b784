"""Train a SentencePiece BPE tokenizer.

python tools/train_tokenizer.py --input train.jsonl --vocab-size 4096 --output tok

Writes tok.model (for `--tokenizer-type SentencePieceTokenizer --tokenizer-model tok.model`) and tok.vocab
(piece, tab, score; a line an id). Ids: 0 <unk>, 1 <s> (bos), 2 </s> (eos, Megatron's end of document), 3
<pad>, 4 to 259 the 256 bytes, then the learned pieces. Text comes back from its tokens unchanged: no
normalisation, every space and newline kept (a newline is the byte piece <0x0A>), unknown characters as
bytes. The one exception is U+2581, SentencePiece's own mark for a space, which comes back as a space. The
same input and flags give the same bytes.
"""

import argparse
import heapq
import io
import random
import sys
import time
from collections.abc import Iterator
from itertools import batched
from pathlib import Path

import sentencepiece

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from hmoe_megatron.data_prep.records import BadRecord, check_inputs, parse_record, read_lines
from hmoe_megatron.files import write_whole

UNK_ID, BOS_ID, EOS_ID, PAD_ID = 0, 1, 2, 3
NEWLINE_PIECE = "<0x0A>"
SPACE_MARK = "\u2581"
MIN_VOCAB_SIZE = 4 + 256 + 1
MAX_LINE_BYTES = 256 << 20
MAX_SENTENCE_CHARS = 16_384  # the trainer drops longer ones without a word, so they are cut here
HELD_OUT_EVERY = 100  # documents
LINES_A_DOCUMENT = 100  # of plain text


def documents(path: str, json_key: str) -> Iterator[str]:
    """The texts of a .jsonl or .json file, else of plain text; .gz too. Raises ValueError with the line."""
    is_json = path.removesuffix(".gz").endswith((".jsonl", ".json"))
    lines = _checked_lines(path, json_key if is_json else None)
    if is_json:
        yield from lines
    else:
        yield from ("\n".join(group) for group in batched(lines, LINES_A_DOCUMENT))


def _checked_lines(path: str, json_key: str | None) -> Iterator[str]:
    for number, line, is_too_long in read_lines(path, MAX_LINE_BYTES):
        try:
            if is_too_long:
                raise BadRecord("too_long", f"more than {MAX_LINE_BYTES} bytes")
            yield parse_record(line, [json_key])[0] if json_key else line.decode("utf-8")
        except (BadRecord, UnicodeDecodeError) as error:
            raise ValueError(f"{path}:{number}: {error}; mend or remove the line") from error


def sample(texts: Iterator[str], max_bytes: int, seed: int) -> tuple[list[str], int]:
    """(a uniform sample in input order, of at most max_bytes of UTF-8; how many texts there were).

    Each text gets a random key and the smallest keys stay: one pass, memory bounded by max_bytes.
    """
    rng, kept, kept_bytes, seen = random.Random(seed), [], 0, 0
    for seen, text in enumerate(texts, start=1):
        size = len(text.encode())
        heapq.heappush(kept, (-rng.random(), seen, size, text))
        kept_bytes += size
        while kept_bytes > max_bytes:
            kept_bytes -= heapq.heappop(kept)[2]
    return [text for _, _, _, text in sorted(kept, key=lambda entry: entry[1])], seen


def train(texts: list[str], vocab_size: int) -> bytes:
    """The serialised model, the same for the same texts: it records no path, and always one thread."""
    sentences = (
        line[start : start + MAX_SENTENCE_CHARS]
        for text in texts
        for line in text.split("\n")
        for start in range(0, len(line), MAX_SENTENCE_CHARS)
    )
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=sentences, model_writer=model, model_type="bpe", vocab_size=vocab_size,
            normalization_rule_name="identity", remove_extra_whitespaces=False, add_dummy_prefix=False,
            allow_whitespace_only_pieces=True, byte_fallback=True,
            unk_id=UNK_ID, bos_id=BOS_ID, eos_id=EOS_ID, pad_id=PAD_ID,
            max_sentence_length=4 * MAX_SENTENCE_CHARS, num_threads=1, minloglevel=2,
        )  # fmt: skip
    except RuntimeError as error:
        raise ValueError(
            f"--vocab-size {vocab_size}: the trainer refused: {str(error).splitlines()[-1].strip()}; "
            f"give a smaller vocabulary or more text than {sum(map(len, texts)):,} characters"
        ) from error
    return model.getvalue()


def measure(model: bytes, texts: list[str]) -> tuple[float, float]:
    """(bytes a token, share of tokens that are byte pieces other than the newline) on `texts`."""
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    newline_id = processor.piece_to_id(NEWLINE_PIECE)
    tokens = text_bytes = byte_tokens = 0
    for text in texts:
        ids = processor.encode(text)
        assert processor.decode(ids) == text.replace(SPACE_MARK, " "), "the tokenizer does not give the text back"
        tokens += len(ids)
        text_bytes += len(text.encode())
        byte_tokens += sum(processor.is_byte(id) and id != newline_id for id in ids)
    return text_bytes / tokens, byte_tokens / tokens


def vocabulary_listing(model: bytes) -> bytes:
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    ids = range(processor.get_piece_size())
    return "".join(f"{processor.id_to_piece(id)}\t{processor.get_score(id):g}\n" for id in ids).encode()


def run(args: argparse.Namespace) -> None:
    """Raises ValueError for a wrong flag or input."""
    if args.vocab_size < MIN_VOCAB_SIZE:
        raise ValueError(f"--vocab-size {args.vocab_size}: 4 special ids and 256 bytes need {MIN_VOCAB_SIZE} or more")
    if args.max_train_bytes < 1:
        raise ValueError(f"--max-train-bytes {args.max_train_bytes}: give a positive number of bytes")
    check_inputs(args.input)
    if not Path(args.output).absolute().parent.is_dir():
        raise ValueError(f"--output {args.output}: its folder does not exist; make it first")
    start_s = time.monotonic()
    everything = (text for path in args.input for text in documents(path, args.json_key))
    texts, seen = sample(everything, args.max_train_bytes, args.seed)
    if not texts:
        raise ValueError(f"--input {' '.join(args.input)}: no text within --max-train-bytes {args.max_train_bytes}")
    held_out = texts[HELD_OUT_EVERY - 1 :: HELD_OUT_EVERY]
    del texts[HELD_OUT_EVERY - 1 :: HELD_OUT_EVERY]
    model = train(texts, args.vocab_size)
    bytes_per_token, fallback_share = measure(model, held_out or texts)
    write_whole(f"{args.output}.vocab", vocabulary_listing(model))
    write_whole(f"{args.output}.model", model)
    where = (
        f"{len(held_out)} held-out documents" if held_out else f"the training text (under {HELD_OUT_EVERY} documents)"
    )
    print(
        f"{args.output}.model: {args.vocab_size} pieces from {len(texts)} of {seen} documents "
        f"in {time.monotonic() - start_s:.1f} s; "
        f"{bytes_per_token:.3f} bytes a token and {fallback_share:.2%} byte fallback on {where}"
    )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--input", nargs="+", required=True, metavar="FILE", help=".jsonl or .json, else plain text; .gz too"
    )
    parser.add_argument("--vocab-size", type=int, required=True, help="pieces, the special and byte ones included")
    parser.add_argument("--output", required=True, metavar="PREFIX", help="writes PREFIX.model and PREFIX.vocab")
    parser.add_argument("--json-key", default="text", help="key of the text in a JSON record (default: text)")
    parser.add_argument("--max-train-bytes", type=int, default=100_000_000, help="sample the documents down to this")
    parser.add_argument("--seed", type=int, default=1234, help="of the sample")
    args = parser.parse_args(argv)
    try:
        run(args)
    except (ValueError, OSError) as error:
        print(f"train_tokenizer: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
