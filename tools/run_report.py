"""Draw the report of a training run: one self-contained HTML page, and its pictures.

python tools/run_report.py runs/mine

Reads telemetry.jsonl, placement_plan.json and run_arguments.json of the run's directory and losses from TensorBoard's
event files.
"""

import argparse
import sys
from pathlib import Path

if not __package__:  # run as a file
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", metavar="RUN", help="what --hmoe-run-dir (default: --save) named")
    parser.add_argument("--output", metavar="FILE", help="the page; default: RUN/report.html")
    parser.add_argument("--png", metavar="DIR", help="the pictures; default: figures/ beside the page")
    parser.add_argument("--tensorboard-dir", metavar="DIR", help="as in training; default: RUN/tensorboard")
    parser.add_argument("--sample", metavar="FILE", help="text that the model wrote, of tools/generate.py --output")
    args = parser.parse_args(argv)
    from hmoe_megatron.tools.report.run_page import write_report  # matplotlib and scipy take seconds to import

    try:
        for path in write_report(args.run, args.output, args.png, args.tensorboard_dir, args.sample):
            print(path)
    except (ValueError, OSError) as error:
        print(f"run_report: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
