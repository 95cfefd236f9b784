"""Draw how a run routes its tokens, as the HMoE paper does: one HTML page that stands alone, and its pictures.

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

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from hmoe_megatron.exits import RunEnded
from hmoe_megatron.routing_report.command import DEFAULT_TOKENS, report


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--load", required=True, type=Path, metavar="RUN", help="--save of a run of pretrain_hmoe.py")
    parser.add_argument("--output", required=True, type=Path, metavar="DIR", help="for report.html and the pictures")
    parser.add_argument("--text", type=Path, nargs="+", default=[], metavar="FILE",
                        help='JSON lines with "text" (.jsonl), or plain text')  # fmt: skip
    parser.add_argument("--tokens", type=int, metavar="N",
                        help=f"of the text that are read; default: all, at most {DEFAULT_TOKENS:,}")  # fmt: skip
    parser.add_argument("--easy", type=Path, metavar="FILE", help="questions as ARC has them, or with a text a line")
    parser.add_argument("--hard", type=Path, metavar="FILE", help="the same, to set beside --easy")
    parser.add_argument("flags", nargs="*", help="after --: flags of pretrain_hmoe.py that override those of the run")
    args = parser.parse_args(argv)
    try:
        for path in report(args):
            print(path)
    except (ValueError, OSError, RunEnded) as error:
        print(f"routing_report: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
