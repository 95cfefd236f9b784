"""Evaluate models beside each other: the paper's six benchmarks with lm-eval, and held-out text; without a network.

python tools/evaluate.py --load runs/a runs/b --benchmarks corpora/benchmarks-eval --input heldout.jsonl
python tools/evaluate.py --hf exported/a --trust-remote-code --tasks none --input heldout.jsonl --output a.json
"""

import argparse
import json
import sys
from importlib.metadata import version
from pathlib import Path

if not __package__:  # run as a file
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from hmoe_megatron.files import atomic_write, check_output
from hmoe_megatron.tools.evaluation import benchmarks, inputs
from hmoe_megatron.tools.evaluation.report import difference, table
from hmoe_megatron.tools.evaluation.work import Work, evaluate_apart

SCHEMA = 1


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add, names = parser.add_argument, ",".join(benchmarks.BENCHMARKS)
    add("--load", nargs="+", default=[], metavar="RUN", help="--save directories of pretrain_hmoe.py")
    add("--hf", nargs="+", default=[], metavar="DIR", help="Hugging Face directories")
    add("--trust-remote-code", action="store_true", help="run the code that --hf directories hold")
    add("--tasks", default=names, metavar="NAMES", help="with commas between them, or none (default: %(default)s)")
    add("--benchmarks", metavar="DIR", help="output of `tools/get_corpus.py benchmarks-eval`")
    kinds = "held-out text: .jsonl, .json, .ndjson, .parquet, else plain text; also .gz, .zst"
    add("--input", nargs="+", default=[], metavar="FILE", help=kinds)
    add("--json-key", default="text", help="key of the text in a record (default: text)")
    add("--limit", type=int, metavar="N", help="only the first N questions and documents of each")
    add("--context", type=int, metavar="TOKENS", help="most a model sees (default: each its own)")
    stride = "of text that a further window scores; less gives more context and takes longer (default: the context)"
    add("--stride", type=int, metavar="TOKENS", help=stride)
    add("--batch-tokens", type=int, default=4096, metavar="TOKENS", help="default: %(default)s")
    add("--output", type=Path, metavar="FILE", help="write the results there as JSON")
    add("--per-question", action="store_true", help="and every choice's log-likelihood with them")
    add("flags", nargs="*", help="after --: flags of pretrain_hmoe.py that override those of --load")
    return parser.parse_args(argv)


def sources_of(args: argparse.Namespace) -> list[inputs.Source]:
    """The models in the order of the table. Raises ValueError."""
    sources = [inputs.Source("load", path, tuple(args.flags)) for path in args.load]
    sources += [inputs.Source("hf", path, (), args.trust_remote_code) for path in args.hf]
    if not 1 <= len(sources) <= 26:
        raise ValueError(f"{len(sources)} models: give --load RUN ... or --hf DIR ..., up to 26 of them")
    for source in sources:
        source.check()
    return sources


def work_of(args: argparse.Namespace) -> Work:
    """What is asked of each, all files read. Raises ValueError."""
    for flag in ("limit", "context", "stride", "batch_tokens"):
        value = getattr(args, flag)
        if value is not None and value < 1:
            raise ValueError(f"--{flag.replace('_', '-')} {value}: give at least 1")
    names = [] if args.tasks == "none" else args.tasks.split(",")
    benchmarks.check_names(names)
    if names and not args.benchmarks:
        command = "python tools/get_corpus.py benchmarks-eval --output DIR"
        raise ValueError(f"--benchmarks DIR is missing: `{command}` makes it; or give --tasks none")
    if names:
        benchmarks.require_lm_eval()
    elif not args.input:
        raise ValueError("--tasks none: nothing is left to evaluate: give text with --input")
    rows = {name: benchmarks.read_rows(args.benchmarks, name) for name in names}
    texts = {pattern: inputs.read_documents(pattern, args.json_key, args.limit) for pattern in args.input}
    return Work(rows, texts, args.limit, args.context, args.stride, args.batch_tokens)


def write_results(args: argparse.Namespace, results: list[dict]) -> None:
    if not args.per_question:
        for task in (task for result in results for task in result["tasks"].values()):
            del task["log_likelihoods"]
    lm_eval = version("lm_eval") if results[0]["tasks"] else None
    content = {"schema": SCHEMA, "lm_eval": lm_eval, "limit": args.limit, "stride": args.stride, "models": results}
    atomic_write(args.output, (json.dumps(content, indent=1) + "\n").encode())


def main(argv: list[str] | None = None) -> int:
    args = arguments(argv)
    try:
        if args.output:
            check_output(args.output, "--output")
        sources, work, results = sources_of(args), work_of(args), []
        for source in sources:
            print(f"evaluating {source.path}", file=sys.stderr)
            result = evaluate_apart(source, work)
            results.append(result | {"against_first": difference(results[0], result) if results else None})
        if args.output:
            write_results(args, results)
    except (ValueError, OSError) as error:
        print(f"evaluate.py: error: {error}", file=sys.stderr)
        return 2
    print(table(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
