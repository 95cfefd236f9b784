"""docs/faults.md from the rows that a campaign told: python -m tests.faults.page ROWS [MADE BY] (see `make faults`)."""

import json
import sys
from pathlib import Path

from benchmarks.machine import ROOT, stamp
from hmoe_megatron.files import atomic_write

OUTPUT = ROOT / "docs" / "faults.md"
HEAD = """# Faults

Made by {by} on {stamp}.

Each fault is put into a run of a tiny model (2 layers, experts of 4 widths, 8 steps, a checkpoint every 2) on gloo
ranks. After each, unless the table says otherwise:
- no rank hangs and no process is left;
- under a final name in `--save` there is nothing half written, and every complete checkpoint equals, bit by bit, that
  of the same step of a run that nothing befell;
- at most one save interval of steps is lost, two with asynchronous saves, where steps go on while one is written;
- the next run ends with the losses and weights of the unbroken run, bit by bit, and nothing of the fault is left in
  `--save`;
- the exit code is 0 only if the fault was absorbed, and an error is one line that names the rank or file.

Exit codes: 2 settings refused, 3 checkpoint refused, 4 saving failed, 5 directory in use.

| fault | cases | outcome |
|---|---|---|
"""


def page(rows: list[dict], stamp: str, by: str = "`make faults`") -> str:
    """Of rows of the same fault the one of the most cases; what failed or was skipped comes first."""
    most = {}
    for row in rows:
        if row["fault"] not in most or row["cases"] >= most[row["fault"]]["cases"]:
            most[row["fault"]] = row
    ordered = sorted(most.values(), key=lambda row: row["cases"] > 0)
    cells = [
        [str(row[name]).replace("|", "\\|").replace("\n", " ").strip() for name in ("fault", "cases", "outcome")]
        for row in ordered
    ]
    return HEAD.format(stamp=stamp, by=by) + "".join(f"| {' | '.join(row)} |\n" for row in cells)


def main() -> None:
    rows = [json.loads(line) for line in Path(sys.argv[1]).read_text(encoding="utf-8").splitlines()]
    atomic_write(OUTPUT, page(rows, stamp("torch", "megatron-core"), *sys.argv[2:]).encode())
    print(f"{len(rows)} rows, written to {OUTPUT}")


if __name__ == "__main__":
    main()
