"""What is in a Megatron data set: counts, lengths, samples of text, whether it is whole.

python tools/inspect_data.py data/train_text_document --samples 3 --picture lengths.png

Checks: the index holds together and fits the .bin; every id is one of the vocabulary; with the sidecar of
tools/preprocess_data.py also sizes, counts and SHA-256 of both files. Samples are decoded with the tokenizer
that the sidecar names, or the one given by Megatron's tokenizer flags. Exit codes: 0 whole, 2 damaged or a
flag is wrong.
"""

import argparse
import random
import shlex
import sys
from pathlib import Path

if not __package__:  # run as a file
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from hmoe_megatron.data.data_set import DataSet
from hmoe_megatron.files import check_output
from hmoe_megatron.tools.data_prep.inspection import Summary, draw_lengths, read_document, summarise

SHOWN_CHARS = 600
BAR_WIDTH = 40


def describe(data: DataSet, summary: Summary, sidecar: dict | None) -> list[str]:
    """Lines of the report, at most 100 columns wide."""
    lines = [
        f"{data.prefix}",
        f"  documents  {summary.documents:,}",
        f"  sequences  {summary.sequences:,}",
        f"  tokens     {summary.tokens:,} of {summary.dtype.__name__}, {data.bin.stat().st_size:,} bytes",
        f"  ids        {summary.lowest_id} to {summary.highest_id}",
        f"  length     {summary.shortest:,} to {summary.longest:,} tokens a sequence, mean {summary.mean:,.1f}, "
        f"median {summary.median:,.0f}",
    ]
    if sidecar:
        tokenizer, counts = sidecar["request"]["tokenizer"], sidecar["counts"]
        bad = ", ".join(f"{kind} {count}" for kind, count in counts["bad_records"].items()) or "none"
        lines += [
            f"  tokenizer  {tokenizer['type']} {tokenizer['model'] or ''}, vocabulary {sidecar['vocab_size']:,}",
            f"  made from  {len(sidecar['request']['inputs'])} files, {counts['records']:,} records, bad ones: {bad}",
        ]
    most = max(count for _, _, count in summary.histogram)
    lines.append("  tokens a sequence")
    for low, high, count in summary.histogram:
        bar = "#" * round(BAR_WIDTH * count / most)
        lines.append(f"  {low:>12,} to {high:>12,}  {count:>12,}  {bar}")
    return lines


def samples(data: DataSet, summary: Summary, count: int, seed: int, decode) -> list[str]:
    rng, lines = random.Random(seed), []
    for number in sorted(rng.sample(range(summary.documents), min(count, summary.documents))):
        ids = read_document(data, number)
        shown = decode(ids[:4096])
        more = " ..." if len(shown) > SHOWN_CHARS or len(ids) > 4096 else ""
        lines += [f"--- document {number}, {len(ids):,} tokens", shown[:SHOWN_CHARS] + more]
    return lines


def decoder(args: argparse.Namespace, megatron_flags: list[str], sidecar: dict | None):
    """ids -> text. Raises ValueError if the tokenizer is not there, or not the one that made the data."""
    from hmoe_megatron.files import file_hashes
    from hmoe_megatron.tools.data_prep.encoding import Encoder
    from hmoe_megatron.tools.data_prep.runs import megatron_tokenizer_args

    if args.tokenizer_type is None:
        if sidecar is None:
            return lambda ids: " ".join(map(str, ids))
        named = sidecar["request"]["tokenizer"]
        args.tokenizer_type, args.tokenizer_model, megatron_flags = named["type"], named["model"], named["other_flags"]
    encoder = Encoder(megatron_tokenizer_args(args, megatron_flags), ["text"], False, 1, None)
    if sidecar:
        hashes = list(file_hashes(args.tokenizer_model, args.vocab_file, args.merge_file).values())
        flags = f"--tokenizer-type {args.tokenizer_type} --tokenizer-model {args.tokenizer_model}"
        DataSet(args.prefix).check_tokenizer(sidecar, args.tokenizer_type, hashes, flags)
    return lambda ids: encoder.tokenizer.detokenize([int(id) for id in ids])


def run(args: argparse.Namespace, megatron_flags: list[str]) -> None:
    """Raises ValueError for a wrong flag, and for a data set that is damaged."""
    if args.samples < 0:
        raise ValueError(f"--samples {args.samples}: give 0 or more")
    if args.picture:
        check_output(args.picture, "--picture")
    data = DataSet(args.prefix.removesuffix(".bin").removesuffix(".idx"))
    args.prefix = data.prefix
    sidecar = data.check_lengths()
    data.check_structure()
    summary = summarise(data, sidecar)
    print("\n".join(describe(data, summary, sidecar)))
    if args.picture:
        draw_lengths(data, summary, Path(args.picture))
        print(f"{args.picture}: histogram of lengths")
    if args.samples:
        print("\n".join(samples(data, summary, args.samples, args.seed, decoder(args, megatron_flags, sidecar))))
    if not sidecar:
        print("whole: index and .bin fit; no sidecar, so no hashes were compared")
    elif args.skip_hashes:
        print("whole: index, .bin and sidecar fit; hashes were not compared (--skip-hashes)")
    else:
        data.check_hashes()
        print("whole: index, .bin and sidecar fit, SHA-256 of both files compared")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("prefix", help="what --data-path takes: the files' name without .bin and .idx")
    parser.add_argument("--samples", type=int, default=3, metavar="N", help="documents to show (default: 3)")
    parser.add_argument("--seed", type=int, default=1234, help="of the choice of samples")
    parser.add_argument("--picture", metavar="FILE.png", help="draw the histogram of lengths")
    parser.add_argument("--skip-hashes", action="store_true", help="do not read both files to compare SHA-256")
    for flag in ("--tokenizer-type", "--tokenizer-model", "--vocab-file", "--merge-file"):
        parser.add_argument(flag, help="another tokenizer than the sidecar's" if flag.endswith("type") else None)
    args, megatron_flags = parser.parse_known_args(argv)
    try:
        if megatron_flags and args.tokenizer_type is None:
            parser.error(f"unrecognized arguments: {shlex.join(megatron_flags)}")
        run(args, megatron_flags)
    except (ValueError, OSError) as error:
        print(f"inspect_data: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
