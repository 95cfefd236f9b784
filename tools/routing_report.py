"""Draw how a run routes its tokens, as the HMoE paper does: one self-contained HTML page, and its pictures.

    python tools/routing_report.py --load runs/a --output routing
    python tools/routing_report.py --load runs/a --output routing --text corpora/shakespeare/shakespeare_valid.jsonl \\
        --easy corpora/benchmarks-eval/arc_easy.jsonl --hard corpora/benchmarks-eval/arc_challenge.jsonl

From telemetry.jsonl alone: activated experts and parameters over training. With text, the last checkpoint reads it:
both by layer, similarity and synergy of the experts, their shares by token difficulty, their top tokens. With --easy
and --hard: what questions activate. docs/routing_report.md has the formulas.
"""

import argparse
import sys
from pathlib import Path

if not __package__:  # run as a file
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from hmoe_megatron.exits import RunEnded
from hmoe_megatron.files import TELEMETRY_FILE


def check(args: argparse.Namespace) -> None:
    """Raises ValueError for flags that don't go together and directories that are none."""
    from hmoe_megatron.tools.report.text import MIN_TOKENS

    if not args.load.is_dir():
        raise ValueError(f"--load {args.load}: no such directory; give what --save of a run named")
    if args.output.exists() and not args.output.is_dir():
        raise ValueError(f"--output {args.output}: is a file; give a directory, which is made if it is missing")
    if args.tokens is not None and args.tokens < MIN_TOKENS:
        raise ValueError(f"--tokens {args.tokens}: give {MIN_TOKENS} at least, or the figures would be noise")
    if args.tokens is not None and not args.text:
        raise ValueError(f"--tokens {args.tokens}: of what? give --text")
    if bool(args.easy) != bool(args.hard):
        given, missing = ("--easy", "--hard") if args.easy else ("--hard", "--easy")
        raise ValueError(f"{given} needs {missing}: the figure sets one beside the other")
    for path in [*args.text, args.easy, args.hard]:
        if path and not path.is_file():
            raise ValueError(f"{path}: no such file; give the path of a file")
    if not (args.text or args.easy or (args.load / TELEMETRY_FILE).exists()):
        raise ValueError(
            f"--load {args.load}: no {TELEMETRY_FILE} is there, and no --text and no --easy and --hard are given: "
            "there is nothing to draw"
        )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--load", required=True, type=Path, metavar="RUN", help="--save of a run of pretrain_hmoe.py")
    parser.add_argument("--output", required=True, type=Path, metavar="DIR", help="for report.html and the pictures")
    text = 'JSON lines with "text" (.jsonl), or plain text'
    parser.add_argument("--text", type=Path, nargs="+", default=[], metavar="FILE", help=text)
    tokens = "of the text that are read; default: all, at most 65,536"
    parser.add_argument("--tokens", type=int, metavar="N", help=tokens)
    parser.add_argument("--easy", type=Path, metavar="FILE", help="questions as ARC has them, or with a text a line")
    parser.add_argument("--hard", type=Path, metavar="FILE", help="the same, to set beside --easy")
    parser.add_argument("flags", nargs="*", help="after --: flags of pretrain_hmoe.py that override those of the run")
    args = parser.parse_args(argv)
    try:
        check(args)
        from hmoe_megatron.tools.report.routing_page import write_report  # matplotlib takes a second to import

        for path in write_report(args):
            print(path)
    except (ValueError, OSError, RunEnded) as error:
        print(f"routing_report: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
