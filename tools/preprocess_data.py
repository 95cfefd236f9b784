"""Turn JSON lines, Parquet or plain text into Megatron's .bin and .idx.

python tools/preprocess_data.py --input train.jsonl 'more/*.jsonl.zst' --output-prefix train --append-eod \\
    --tokenizer-type SentencePieceTokenizer --tokenizer-model tok.model --workers 8

For each key it writes PREFIX_KEY_document.bin, .idx and .json (inputs, tokenizer, counts, versions,
hashes). Documents are in the input's order and the bytes are the same for any --workers, any number of
shards, however often the work was interrupted: the same command goes on from what was committed. Every
record is a document or is counted as a bad one. Outputs get their names when whole, the .idx last: without
it Megatron sees no data set. The same command once more does nothing.

On many nodes: `mpirun -n 16 python tools/preprocess_data.py ...`, or 16 independent runs with --shard 0/16
to --shard 15/16, and then the command with --merge 16.

Every tokenizer flag of Megatron's own is understood (--vocab-size, --tiktoken-pattern, ...). Exit codes:
0 done, 1 the machine failed (a worker died, the disk is full), 2 a flag, a file or a record is wrong.
"""

import argparse
import os
import signal
import sys
import traceback
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path

if not __package__:  # run as a file
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from hmoe_megatron.data.tokenizer_flags import check_tokenizer_file
from hmoe_megatron.files import check_output
from hmoe_megatron.launch.mpi import process_of, start_mpi
from hmoe_megatron.tools.data_prep.publish import is_output
from hmoe_megatron.tools.data_prep.runs import run_alone, run_under_mpi
from hmoe_megatron.tools.data_prep.sources import SAMPLE_BY, Source, find_sources

MAX_DOC_BYTES = 2**31 - 2  # Megatron's index holds lengths as int32, and a token is at most a byte of a record
DEFAULT_MAX_DOC_BYTES = 16 << 20
MAX_SHARDS = 9999


def check_flags(args: argparse.Namespace, megatron_flags: list[str]) -> list[Source]:
    """The inputs. Raises ValueError for what can be seen to be wrong before Megatron is imported."""
    sources = find_sources(args.input, args.sample_by, lambda p: is_output(p, args.output_prefix, args.json_keys))
    if megatron_flags and not megatron_flags[0].startswith("--"):
        raise ValueError(f"{megatron_flags[0]}: belongs to no flag; give files as --input FILE...")
    check_tokenizer_file(args.tokenizer_type, args.tokenizer_model)
    if not any(source.bytes for source in sources):
        raise ValueError(f"--input {' '.join(args.input)}: holds 0 bytes; give files with text")
    if args.workers < 1:
        raise ValueError(f"--workers {args.workers}: give 1 or more")
    if not 1 <= args.max_doc_bytes <= MAX_DOC_BYTES:
        raise ValueError(f"--max-doc-bytes {args.max_doc_bytes}: give 1 to {MAX_DOC_BYTES}")
    if args.max_bad_records is not None and args.on_bad_record == "stop":
        raise ValueError(
            "--max-bad-records: --on-bad-record stop allows none; give skip or quarantine, or leave it out"
        )
    if args.max_bad_records is not None and args.max_bad_records < 0:
        raise ValueError(f"--max-bad-records {args.max_bad_records}: give 0 or more")
    keys = args.json_keys
    if len(set(keys)) != len(keys) or any("/" in key or not key for key in keys):
        raise ValueError(f"--json-keys {' '.join(keys)}: they name files; give each once, none empty or with '/'")
    if len(keys) > 1 and (texts := [source.path for source in sources if source.kind in SAMPLE_BY]):
        raise ValueError(f"--json-keys {' '.join(keys)}: {texts[0]} is plain text and has no keys; give one key")
    prefix = Path(args.output_prefix)
    if not prefix.name or prefix.is_dir():
        raise ValueError(f"--output-prefix {prefix}: a folder; give a name in it, such as data/train")
    check_output(prefix, "--output-prefix")
    if args.shard and args.merge:
        raise ValueError("--shard and --merge: first run every shard, then merge them")
    if args.merge is not None and not 2 <= args.merge <= MAX_SHARDS:
        raise ValueError(f"--merge {args.merge}: give the number of shards, 2 to {MAX_SHARDS}")
    return sources


def shard_of(word: str) -> tuple[int, int]:
    """(number from 0, of how many) from "2/16"."""
    number, _, shards = word.partition("/")
    if not (number.isdecimal() and shards.isdecimal() and int(number) < int(shards) <= MAX_SHARDS and int(shards) > 1):
        raise argparse.ArgumentTypeError(f"{word}: give number/shards, the number from 0, such as 0/16 to 15/16")
    return int(number), int(shards)


def parse_flags(argv: list[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """(our flags, the words left for Megatron's tokenizer flags)."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument(
        "--input",
        nargs="+",
        required=True,
        metavar="FILE",
        help="files or patterns: .jsonl, .json, .parquet, else plain text; .gz and .zst too",
    )
    parser.add_argument("--output-prefix", required=True, metavar="PREFIX")
    parser.add_argument(
        "--sample-by",
        choices=SAMPLE_BY,
        default="document",
        help="what of plain text is a document: a file, what is between empty lines, a line (default: document)",
    )
    parser.add_argument("--tokenizer-type", required=True, help="any of Megatron's, such as SentencePieceTokenizer")
    parser.add_argument("--tokenizer-model", help="file or folder of the tokenizer")
    parser.add_argument("--vocab-file")
    parser.add_argument("--merge-file")
    parser.add_argument(
        "--json-keys", nargs="+", default=["text"], metavar="KEY", help="one data set a key (default: text)"
    )
    parser.add_argument("--append-eod", action="store_true", help="end each document with the end-of-document id")
    parser.add_argument("--workers", type=int, default=1, metavar="N", help="processes that tokenize (default: 1)")
    parser.add_argument("--on-bad-record", choices=["stop", "skip", "quarantine"], default="stop")
    parser.add_argument("--max-bad-records", type=int, metavar="N", help="with skip or quarantine: stop at one more")
    parser.add_argument(
        "--max-doc-bytes",
        type=int,
        default=DEFAULT_MAX_DOC_BYTES,
        metavar="N",
        help=f"a longer record is a bad one (default: {DEFAULT_MAX_DOC_BYTES})",
    )
    parser.add_argument(
        "--stock-tokenizer",
        action="store_true",
        help="Megatron's own call for each text, slower: no faster way that is equal on a sample of the input",
    )
    parser.add_argument("--shard", type=shard_of, metavar="I/N", help="do part I, from 0, of N, to be merged later")
    parser.add_argument("--merge", type=int, metavar="N", help="join the N shards that are done")
    return parser.parse_known_args(argv)


@contextmanager
def together(world):
    """What one process of mpirun does not live through ends all: the others would wait for it. But for a ValueError,
    which run_under_mpi tells them."""
    try:
        yield world
    except ValueError:
        raise
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        world.Abort(1)


def main(argv: list[str] | None = None) -> int:
    args, megatron_flags = parse_flags(argv)
    process = process_of(os.environ)
    kept = "the work done is kept, the same command goes on"
    try:
        sources = check_flags(args, megatron_flags)
        if not process:
            run_alone(args, megatron_flags, sources)
        elif args.shard or args.merge:
            raise ValueError("--shard and --merge: mpirun does both; leave them out")
        else:
            with together(start_mpi(process[1]).COMM_WORLD) as world:
                run_under_mpi(args, megatron_flags, sources, world)
    except ValueError as error:
        if str(error):
            print(f"preprocess_data: {error}", file=sys.stderr)
        return 2
    except BrokenProcessPool:
        died = f"a worker process died, often for lack of memory: try fewer --workers; {kept}"
        print(f"preprocess_data: {died}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"preprocess_data: {error}; {kept}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"preprocess_data: interrupted; {kept}", file=sys.stderr)
        return 128 + signal.SIGINT
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # ends the workers too
    sys.exit(main())
