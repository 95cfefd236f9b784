"""Two cores are shared by all tests and by the ranks they start: one thread each. Rows of docs/faults.md.

Hypothesis tries the same examples every time; HYPOTHESIS_PROFILE=explore, of `make campaign`, tries others.
"""

import gc
import json
import os
import signal

import pytest
from hypothesis import settings

os.environ.setdefault("OMP_NUM_THREADS", "1")
# A shell's background job ignores Ctrl-C, and so would every process that it starts: the tests send it.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

import torch  # noqa: E402  (reads OMP_NUM_THREADS when it is imported)

torch.set_num_threads(1)
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # the triton backend in Triton's interpreter, before it is imported
settings.register_profile("suite", derandomize=True)
settings.register_profile("explore", derandomize=False)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "suite"))


def _add_row(test, fault, cases, outcome):
    if rows := os.environ.get("FAULTS_ROWS"):
        with open(rows, "a", encoding="utf-8") as file:
            file.write(json.dumps({"test": test, "fault": fault, "cases": cases, "outcome": outcome}) + "\n")


def pytest_collection_finish():
    gc.freeze()  # some tests collect garbage often: what is imported by now stays


@pytest.fixture
def told(request):
    """told(fault, cases, outcome): a row of docs/faults.md, to the file that FAULTS_ROWS names."""
    return lambda fault, cases, outcome: _add_row(request.node.nodeid, fault, cases, outcome)


def pytest_runtest_logreport(report):
    """What failed or was skipped is in the table too."""
    if report.failed or report.skipped:
        reason = report.longrepr[-1] if report.skipped else "see the test"
        _add_row(report.nodeid, f"`{report.nodeid.split('::')[-1]}`", 0, f"{report.outcome.upper()}: {reason}")
