#!/usr/bin/env python3
"""Says what this machine has, what a run will use and how to repair what is broken; exit status 1 on a fail."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

if not __package__:  # run as a file, also where the package is not installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from hmoe_megatron.tools import machine_checks


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print one JSON object, with torch's report, not lines")
    return machine_checks.report(as_json=parser.parse_args(argv).json)


if __name__ == "__main__":
    sys.exit(main())
