"""Turn JSON lines into Megatron's .bin and .idx.

python tools/preprocess_data.py --input train.jsonl --output-prefix train --append-eod \\
    --tokenizer-type SentencePieceTokenizer --tokenizer-model tok.model

For each key it writes PREFIX_KEY_document.bin, .idx and .json (inputs, tokenizer, counts, versions,
hashes). Documents are in the input's order and the bytes are the same for any --workers. Every line is a
document or is counted as a bad record. Outputs get their names when whole, the .idx last: without it
Megatron sees no data set. The same command a second time does nothing. Every tokenizer flag of Megatron's
own is understood (--vocab-size, --tiktoken-pattern, ...). Exit codes: 0 done, 1 the machine failed (a
worker died, the disk is full), 2 a flag, a file or a record is wrong.
"""

import argparse
import contextlib
import importlib.metadata
import os
import signal
import sys
import time
import warnings
from collections import Counter
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from hmoe_megatron.data_prep.encoding import Bad, Encoder, encode_in_order, read_chunks
from hmoe_megatron.data_prep.files import SCHEMA, Output, fingerprint, is_done
from hmoe_megatron.data_prep.records import check_inputs
from hmoe_megatron.files import sha256_file

MAX_DOC_BYTES = 2**31 - 2  # Megatron's index holds lengths as int32, and a token is at most a byte of a line
PACKAGES = ("megatron-core", "numpy", "sentencepiece", "tokenizers", "tiktoken")


def convert(args: argparse.Namespace, encoder: Encoder, encoder_args: tuple, output: Output) -> dict:
    """Writes all documents to `output`; returns lines, documents, tokens by key and bad records by kind.

    Raises ValueError for a record that the policy does not let pass, and if no document is left.
    """
    bad_counts, documents, lines, tokens = Counter(), 0, 0, [0] * len(args.json_keys)
    chunks = encode_in_order(read_chunks(args.input, args.max_doc_bytes), encoder, encoder_args, args.workers)
    with contextlib.closing(chunks), tqdm(unit=" lines", unit_scale=True, disable=None) as progress:
        for results in chunks:
            for result in results:
                lines += 1
                if not isinstance(result, Bad):
                    output.add(result)
                    documents += 1
                    tokens = [count + len(ids) for count, ids in zip(tokens, result, strict=True)]
                    continue
                bad_counts[result.reason] += 1
                where = f"{result.file}:{result.line}: {result.reason}: {result.detail}"
                if args.on_bad_record == "stop":
                    raise ValueError(f"{where}; mend the record or give --on-bad-record skip or quarantine")
                if args.max_bad_records is not None and bad_counts.total() > args.max_bad_records:
                    limit = f"one more than --max-bad-records {args.max_bad_records}"
                    raise ValueError(f"{where}; that is {limit} ({_listing(bad_counts)})")
                if args.on_bad_record == "quarantine":
                    output.add_to_quarantine(result)
            progress.update(len(results))
            counts = {"documents": documents, "tokens": sum(tokens), "bad": bad_counts.total()}
            progress.set_postfix(counts, refresh=False)
    assert lines == documents + bad_counts.total(), "a line was neither written nor counted as bad"
    if not documents:
        raise ValueError(f"--input {' '.join(args.input)}: no document in {lines} lines ({_listing(bad_counts)})")
    bad_records = dict(sorted(bad_counts.items()))
    return {"lines": lines, "documents": documents, "tokens": tokens, "bad_records": bad_records}


def _listing(bad_counts: dict[str, int]) -> str:
    return ", ".join(f"{kind} {count}" for kind, count in sorted(bad_counts.items())) or "no bad record"


def file_hashes(path: str | None) -> dict[str, str]:
    """{name: SHA-256} of a file, of the files of a folder, or {} where `path` is no path on this disk."""
    if not path or not os.path.exists(path):
        return {}
    root = Path(path)
    files = sorted(file for file in root.rglob("*") if file.is_file()) if root.is_dir() else [root]
    return {str(file.relative_to(root.parent)): sha256_file(file) for file in files}


def request_of(args: argparse.Namespace, megatron_flags: list[str]) -> dict:
    """All that decides the output's bytes: two runs with equal requests make equal data sets."""
    hashes = [file_hashes(path) for path in (args.tokenizer_model, args.vocab_file, args.merge_file)]
    return {
        "inputs": [{"path": p, "bytes": os.path.getsize(p), "sha256": sha256_file(p)} for p in args.input],
        "tokenizer": {
            "type": args.tokenizer_type, "model": args.tokenizer_model, "other_flags": megatron_flags,
            "sha256": hashes[0] | hashes[1] | hashes[2],
        },
        "json_keys": args.json_keys, "append_eod": args.append_eod, "max_doc_bytes": args.max_doc_bytes,
        "on_bad_record": args.on_bad_record, "max_bad_records": args.max_bad_records,
    }  # fmt: skip


def megatron_tokenizer_args(args: argparse.Namespace, flags: list[str]) -> argparse.Namespace:
    """What Megatron's build_tokenizer reads, from its own parser and defaults."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from megatron.training.argument_utils import ArgumentGroupFactory
        from megatron.training.config import TokenizerConfig
    parser = argparse.ArgumentParser(prog="preprocess_data.py", allow_abbrev=False, add_help=False)
    ArgumentGroupFactory(TokenizerConfig).build_group(parser, "tokenizer")
    own = {"--tokenizer-type": args.tokenizer_type, "--tokenizer-model": args.tokenizer_model,
           "--vocab-file": args.vocab_file, "--merge-file": args.merge_file}  # fmt: skip
    given = [word for flag, value in own.items() if value is not None for word in (flag, value)]
    tokenizer_args = parser.parse_args(given + flags)
    tokenizer_args.pad_vocab_size = False  # padding is the model's affair
    return tokenizer_args


def check_flags(args: argparse.Namespace, megatron_flags: list[str]) -> None:
    """Raises ValueError for what can be seen to be wrong before Megatron is imported."""
    check_inputs(args.input)
    if megatron_flags and not megatron_flags[0].startswith("--"):
        raise ValueError(f"{megatron_flags[0]}: belongs to no flag; give files as --input FILE...")
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
    prefix = Path(args.output_prefix)
    if not prefix.name or prefix.is_dir() or not prefix.absolute().parent.is_dir():
        raise ValueError(f"--output-prefix {prefix}: give a name in a folder that exists, such as data/train")


def run(args: argparse.Namespace, megatron_flags: list[str]) -> None:
    """Raises ValueError for a wrong flag, file or record."""
    start_s = time.monotonic()
    check_flags(args, megatron_flags)
    request = request_of(args, megatron_flags)
    if is_done(args, request):
        print(f"{args.output_prefix}: made by this very command before, whole; nothing done")
        return
    encoder_args = (megatron_tokenizer_args(args, megatron_flags), args.json_keys, args.append_eod)
    encoder = Encoder(*encoder_args)
    output = Output(args.output_prefix, args.json_keys, encoder.dtype)
    try:
        counts = convert(args, encoder, encoder_args, output)
        if any(sha256_file(file["path"]) != file["sha256"] for file in request["inputs"]):
            raise ValueError(f"--input {' '.join(args.input)}: changed while it was read; run again")
        tokens_by_key = dict(zip(args.json_keys, counts["tokens"], strict=True))
        output.publish([_sidecar(key, request, encoder, counts, n) for key, n in tokens_by_key.items()])
    finally:
        output.close()
    for name, tokens in zip(output.names, counts["tokens"], strict=True):
        print(f"{output.prefix.with_name(name)}: {counts['documents']:,} documents, {tokens:,} tokens")
    where = f", kept in {args.output_prefix}.quarantine.jsonl" if output.quarantine else ""
    print(f"bad records: {_listing(counts['bad_records'])}{where}; {time.monotonic() - start_s:.1f} s")


def _sidecar(key: str, request: dict, encoder: Encoder, counts: dict, tokens: int) -> dict:
    versions = {package: version for package in PACKAGES if (version := _version(package))}
    return {
        "schema": SCHEMA, "fingerprint": fingerprint(request), "json_key": key, "request": request,
        "vocab_size": encoder.vocab_size, "eod_id": encoder.eod_id, "dtype": encoder.dtype.__name__,
        "counts": {**counts, "tokens": tokens},
        "versions": {"python": ".".join(map(str, sys.version_info[:3])), **versions},
    }  # fmt: skip


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def parse_flags(argv: list[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """(our flags, the words left for Megatron's tokenizer flags)."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--input", nargs="+", required=True, metavar="FILE", help="JSON lines, plain or .gz")
    parser.add_argument("--output-prefix", required=True, metavar="PREFIX")
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
        "--max-doc-bytes", type=int, default=64 << 20, metavar="N", help="a longer line is a bad record"
    )
    return parser.parse_known_args(argv)


def main(argv: list[str] | None = None) -> int:
    args, megatron_flags = parse_flags(argv)
    try:
        run(args, megatron_flags)
    except ValueError as error:
        print(f"preprocess_data: {error}", file=sys.stderr)
        return 2
    except BrokenProcessPool:
        died = "a worker process died, often for lack of memory; no data set was written, try fewer --workers"
        print(f"preprocess_data: {died}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"preprocess_data: {error}; no data set was written", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    # A plain SIGTERM would skip the removal of what is half-written.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    sys.exit(main())
