"""Runs that nothing befell, to compare with; the table of outcomes."""

import json
import os

import pytest

from tests.faults.harness import reference


@pytest.fixture(scope="session")
def two(tmp_path_factory):
    return reference(2, tmp_path_factory.mktemp("two"))


@pytest.fixture(scope="session")
def four(tmp_path_factory):
    return reference(4, tmp_path_factory.mktemp("four"))


@pytest.fixture
def told(request):
    """told(fault, cases, outcome): a row of docs/faults.md, to the file that FAULTS_ROWS names."""

    def tell(fault: str, cases: int, outcome: str) -> None:
        if rows := os.environ.get("FAULTS_ROWS"):
            row = {"test": request.node.nodeid, "fault": fault, "cases": cases, "outcome": outcome}
            with open(rows, "a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")

    return tell
