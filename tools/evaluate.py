"""Evaluate models beside each other: the paper's six benchmarks with lm-eval, and held-out text; without a network.

    python tools/evaluate.py --load runs/a runs/b --benchmarks corpora/benchmarks-eval --input heldout.jsonl
    python tools/evaluate.py --hf exported/a --trust-remote-code --tasks none --input heldout.jsonl --output a.json
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from hmoe_megatron.evaluation import benchmarks, inputs
from hmoe_megatron.evaluation.report import difference, table
from hmoe_megatron.evaluation.work import Work, evaluate_apart
from hmoe_megatron.files import atomic_write

SCHEMA = 1


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--load", nargs="+", default=[], metavar="RUN", help="--save directories of pretrain_hmoe.py")
    parser.add_argument("--hf", nargs="+", default=[], metavar="DIR", help="Hugging Face directories")
    parser.add_argument("--trust-remote-code", action="store_true", help="run the code that --hf directories hold")
    parser.add_argument("--tasks", default=",".join(benchmarks.BENCHMARKS), metavar="NAMES",
                        help="with commas between them, or none (default: %(default)s)")  # fmt: skip
    parser.add_argument("--benchmarks", metavar="DIR", help="output of `tools/get_corpus.py benchmarks-eval`")
    parser.add_argument("--input", nargs="+", default=[], metavar="FILE", help="held-out text: .jsonl, .json, .ndjson, "
                        ".parquet, else plain text; also .gz, .zst")  # fmt: skip
    parser.add_argument("--json-key", default="text", help="key of the text in a record (default: text)")
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N questions and documents of each")
    parser.add_argument("--context", type=int, metavar="TOKENS", help="most a model sees (default: each its own)")
    parser.add_argument("--stride", type=int, metavar="TOKENS", help="of text that a further window scores; less gives "
                        "more context and takes longer (default: the context)")  # fmt: skip
    parser.add_argument("--batch-tokens", type=int, default=4096, metavar="TOKENS", help="default: %(default)s")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the results there as JSON")
    parser.add_argument("--per-question", action="store_true", help="and every choice's log-likelihood with them")
    parser.add_argument("flags", nargs="*", help="after --: flags of pretrain_hmoe.py that override those of --load")
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
        raise ValueError("--benchmarks DIR is missing: `python tools/get_corpus.py benchmarks-eval --output DIR` "
                         "makes it; or give --tasks none")  # fmt: skip
    if names:
        benchmarks.require_lm_eval()
    elif not args.input:
        raise ValueError("--tasks none: nothing is left to evaluate: give text with --input")
    return Work(
        rows={name: benchmarks.read_rows(args.benchmarks, name) for name in names},
        texts={pattern: inputs.read_documents(pattern, args.json_key, args.limit) for pattern in args.input},
        limit=args.limit, context=args.context, stride=args.stride, batch_tokens=args.batch_tokens,
    )  # fmt: skip


def write_results(path: Path, args: argparse.Namespace, results: list[dict]) -> None:
    if not args.per_question:
        results = [result | {"tasks": {name: {key: value for key, value in task.items() if key != "log_likelihoods"}
                                       for name, task in result["tasks"].items()}} for result in results]  # fmt: skip
    content = {"schema": SCHEMA, "lm_eval": benchmarks.lm_eval_version() if results[0]["tasks"] else None,
               "limit": args.limit, "stride": args.stride, "models": results}  # fmt: skip
    atomic_write(path, (json.dumps(content, indent=1) + "\n").encode())


def main(argv: list[str] | None = None) -> int:
    args = arguments(argv)
    try:
        if args.output and not args.output.parent.is_dir():
            raise ValueError(f"--output {args.output}: no such directory: make it first")
        sources, work, results = sources_of(args), work_of(args), []
        for source in sources:
            print(f"evaluating {source.path}", file=sys.stderr)
            result = evaluate_apart(source, work)
            results.append(result | {"against_first": difference(results[0], result) if results else None})
        if args.output:
            write_results(args.output, args, results)
    except (ValueError, OSError) as error:
        print(f"evaluate.py: error: {error}", file=sys.stderr)
        return 2
    print(table(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
