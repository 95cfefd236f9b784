"""Train a tokenizer: SentencePiece BPE or Hugging Face's byte-level BPE.

python tools/train_tokenizer.py --input train.jsonl 'more/*.parquet' --vocab-size 4096 --output tok

--type sentencepiece writes tok.model (for `--tokenizer-type SentencePieceTokenizer --tokenizer-model
tok.model`) and tok.vocab (piece, tab, score; a line an id). Ids: 0 <unk>, 1 <s> (bos), 2 </s> (eos,
Megatron's end of document), 3 <pad>, the special tokens, the 256 bytes, then the learned pieces. Text comes
back from its tokens unchanged: no normalisation, every space and newline kept (a newline is the byte piece
<0x0A>), unknown characters as bytes. The one exception is U+2581, SentencePiece's own mark for a space,
which comes back as a space.

--type byte-level-bpe writes the folder tok/ (for `--tokenizer-type HuggingFaceTokenizer --tokenizer-model
tok`, and for transformers). Ids: 0 <|endoftext|> (end of document), the special tokens, the 256 bytes, then
the merges. Text comes back unchanged. tools/preprocess_data.py is fastest with it.

Both write tok.report.json: bytes a token and the share of tokens that are parts of a character, on
documents that were held out. The text of a special token becomes its one id. The same input and flags give
the same bytes.
"""

import argparse
import json
import re
import sys
import time
from pathlib import Path

if not __package__:  # run as a file
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from hmoe_megatron.files import atomic_write, check_output, is_utf8
from hmoe_megatron.tools.data_prep.sources import SAMPLE_BY, find_sources
from hmoe_megatron.tools.data_prep.tokenizer_training import KINDS, measure, sample, texts_of

HELD_OUT_EVERY = 100  # documents


def run(args: argparse.Namespace) -> None:
    """Raises ValueError for a wrong flag or input."""
    kind = KINDS[args.type]
    minimum = kind.min_vocab_size + len(args.special_tokens)
    if args.vocab_size < minimum:
        raise ValueError(f"--vocab-size {args.vocab_size}: the special tokens and 256 bytes need {minimum} or more")
    if args.max_train_bytes < 1:
        raise ValueError(f"--max-train-bytes {args.max_train_bytes}: give a positive number of bytes")
    if len(set(args.special_tokens)) != len(args.special_tokens) or not all(map(str.strip, args.special_tokens)):
        raise ValueError(f"--special-tokens {' '.join(args.special_tokens)}: give each once, none empty")
    if not all(map(is_utf8, args.special_tokens)):
        raise ValueError("--special-tokens: not UTF-8: give the text in a UTF-8 terminal or script")
    sources = find_sources(args.input, args.sample_by)
    check_output(f"{args.output}.report.json", "--output")
    start_s = time.monotonic()
    texts, seen = sample(texts_of(sources, args.json_key), args.max_train_bytes, args.seed)
    if not texts:
        raise ValueError(f"--input {' '.join(args.input)}: no text within --max-train-bytes {args.max_train_bytes}")
    held_out = texts[HELD_OUT_EVERY - 1 :: HELD_OUT_EVERY]
    del texts[HELD_OUT_EVERY - 1 :: HELD_OUT_EVERY]
    try:
        tokenizer = kind.train(texts, args.vocab_size, args.special_tokens)
    except RuntimeError as error:
        said = str(error).splitlines()[-1].strip()
        raise ValueError(
            f"--vocab-size {args.vocab_size}: the trainer refused: {said}; {_remedy(said, texts)}"
        ) from error
    found = measure(tokenizer, held_out or texts)
    report = {
        "type": args.type,
        "vocab_size": args.vocab_size,
        "special_tokens": args.special_tokens,
        "seed": args.seed,
        "documents": {"seen": seen, "trained_on": len(texts), "held_out": len(held_out)},
        "measured_on": "held-out text" if held_out else "the training text",
        **found._asdict(),
    }
    files = tokenizer.files() | {".report.json": (json.dumps(report, indent=1) + "\n").encode()}
    for name, data in files.items():
        atomic_write(f"{args.output}{name}", data)
    where = f"{len(held_out)} held-out documents" if held_out else f"the text itself (under {HELD_OUT_EVERY} documents)"
    print(
        f"{args.output}: {args.vocab_size} entries from {len(texts)} of {seen} documents "
        f"in {time.monotonic() - start_s:.1f} s; {found.bytes_per_token:.3f} bytes a token, {found.fallback_share:.2%} "
        f"of the tokens parts of a character, on {where}\nuse it: {kind.flags.format(prefix=args.output)}"
    )


def _remedy(said: str, texts: list[str]) -> str:
    """What to give instead, from what SentencePiece says."""
    if least := re.search(r"required_chars\D+\d+ vs (\d+)", said):
        return f"the characters of the text need --vocab-size {least[1]} or more"
    most = re.search(r"(?:value <=|the text gives) (\d+)", said)
    smaller = f"--vocab-size {most[1]} or less" if most else "a smaller vocabulary"
    return f"give {smaller}, or more text than {sum(map(len, texts)):,} characters"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--input",
        nargs="+",
        required=True,
        metavar="FILE",
        help="files or patterns: .jsonl, .json, .parquet, else plain text; .gz and .zst too",
    )
    parser.add_argument("--vocab-size", type=int, required=True, help="entries, the special and byte ones included")
    parser.add_argument("--output", required=True, metavar="PREFIX", help="what the files' names begin with")
    parser.add_argument("--type", choices=KINDS, default="sentencepiece", help="default: sentencepiece")
    parser.add_argument("--special-tokens", nargs="+", default=[], metavar="TOKEN", help="besides those of the type")
    parser.add_argument(
        "--sample-by",
        choices=SAMPLE_BY,
        default="paragraph",
        help="what of plain text is a document (default: paragraph)",
    )
    parser.add_argument("--json-key", default="text", help="key of the text in a record (default: text)")
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
