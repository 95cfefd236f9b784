"""How tools start: `--help` answers at once, and what needs only the index of a data set imports no torch."""

import os
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from hmoe_megatron.tools.data_prep.index import write_index

ROOT = Path(__file__).parents[2]
TOOLS = sorted(path.stem for path in (ROOT / "tools").glob("*.py") if path.stem != "__init__")
HEAVY = {"torch", "megatron", "transformers", "matplotlib", "scipy"}
HELP_CPU_S = 1.0
# Runs a tool as a file does, then says on the last line which of HEAVY were imported.
CODE = f"""
import runpy, sys
sys.argv = sys.argv[1:]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    print("imported:", *({HEAVY} & sys.modules.keys()))
"""


def start(tool, *words):
    """(what it printed, the set of HEAVY that it imported, CPU seconds)."""
    command = [sys.executable, "-c", CODE, ROOT / f"tools/{tool}.py", *words]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, done.stderr
    *printed, imported = done.stdout.splitlines()
    cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return "\n".join(printed), set(imported.split()[1:]), cpu_s


@pytest.mark.parametrize("tool", TOOLS)
def test_help_answers_at_once(tool):
    printed, imported, cpu_s = start(tool, "--help")
    assert printed.startswith("usage: ") and not imported
    assert cpu_s <= HELP_CPU_S


def test_a_data_set_is_inspected_without_torch(tmp_path):
    (tmp_path / "lengths").write_bytes(np.array([3, 2], dtype=np.int32).tobytes())
    write_index(tmp_path / "data.idx", [tmp_path / "lengths"], np.uint16)
    (tmp_path / "data.bin").write_bytes(np.arange(5, dtype=np.uint16).tobytes())
    printed, imported, _ = start("inspect_data", tmp_path / "data")
    assert "documents  2" in printed and not imported
