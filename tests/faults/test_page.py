"""The table of outcomes."""

from tests.faults.page import page


def row(fault, cases, outcome="good"):
    return {"test": "t", "fault": fault, "cases": cases, "outcome": outcome}


def test_a_fault_has_one_row_and_what_failed_comes_first():
    rows = [row("a", 2), row("a", 100, "of 100 | all"), row("b", 1), row("`test_c`", 0, "SKIPPED: why\nnot")]
    text = page(rows, "MACHINE")
    assert "Made by `make faults` on MACHINE." in text
    rows = [line for line in text.splitlines() if line.startswith("| ")][1:]
    assert rows == ["| `test_c` | 0 | SKIPPED: why not |", "| a | 100 | of 100 \\| all |", "| b | 1 | good |"]
