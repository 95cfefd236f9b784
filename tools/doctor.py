#!/usr/bin/env python3
"""Says what this machine has, what a run will use and how to mend what is broken; exit status 1 on a fail."""

import argparse
import sys
from pathlib import Path

# Also where the package is not installed.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from hmoe_megatron import doctor  # noqa: E402


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of lines")
    return doctor.report(as_json=parser.parse_args().json)


if __name__ == "__main__":
    sys.exit(main())
