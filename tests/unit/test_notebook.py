"""examples/hmoe_in_a_notebook.ipynb runs without Jupyter, Megatron and transformers, and shows what it says."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

from matplotlib.image import imread

ROOT = Path(__file__).parents[2]
NOTEBOOK = json.loads((ROOT / "examples/hmoe_in_a_notebook.ipynb").read_text(encoding="utf-8"))
MOST_S = 60
BEFORE = """
import sys
import matplotlib.pyplot as plt
sys.modules["megatron"] = sys.modules["transformers"] = None
def show(drawn=[]):
    drawn.append(1)
    plt.savefig(f"{sys.argv[1]}/{len(drawn)}.png")
    plt.close()
plt.show = show
"""
AFTER = """
used = {name: (maps[-20:].float() @ width_E).mean() for name, (maps, _) in runs.items()}
assert used["Top-K, P-Penalty"] < 0.95 * used["Top-K, no penalty"], used
assert all(error < 0.05 for _, error in runs.values()), "the layers must learn"
assert counts["Top-K, P-Penalty"].unique().tolist() == [2]
many_N = counts["Top-P, P-Penalty"].float().mean(dim=1)
assert many_N[-20:].mean() < 0.8 * many_N[:20].mean() and len(counts["Top-P, P-Penalty"].unique()) > 2
assert plan.predicted.over_mean < 1.03 < in_order.predicted.over_mean
"""


def code_cells():
    return ["".join(cell["source"]) for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]


def test_it_is_a_notebook_without_outputs():
    assert (NOTEBOOK["nbformat"], NOTEBOOK["nbformat_minor"]) == (4, 5)
    assert NOTEBOOK.keys() == {"cells", "metadata", "nbformat", "nbformat_minor"}
    ids = [cell["id"] for cell in NOTEBOOK["cells"]]
    assert len(set(ids)) == len(ids) and all(re.fullmatch(r"[\w-]{1,64}", name) for name in ids)
    of_every_cell = {"cell_type", "id", "metadata", "source"}
    for cell in NOTEBOOK["cells"]:
        is_code = cell["cell_type"] == "code"
        assert is_code or cell["cell_type"] == "markdown"
        assert cell.keys() == of_every_cell | ({"execution_count", "outputs"} if is_code else set())
        assert cell.get("outputs", []) == [] and cell.get("execution_count") is None
        lines = cell["source"]
        assert "".join(lines).splitlines(keepends=True) == lines


def test_it_runs_and_draws(tmp_path):
    script = tmp_path / "cells.py"
    script.write_text("\n".join([BEFORE, *code_cells(), AFTER]), encoding="utf-8")
    environment = os.environ | {"MPLBACKEND": "Agg", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, script, tmp_path],
        cwd=ROOT / "examples",
        env=environment,
        capture_output=True,
        text=True,
        timeout=MOST_S,
    )
    assert done.returncode == 0, done.stderr
    assert "4 ranks" in done.stdout and "planned" in done.stdout.splitlines()[-1]
    pictures = [imread(path) for path in sorted(tmp_path.glob("*.png"))]
    assert len(pictures) == sum(cell.count("plt.show()") for cell in code_cells()) == 2
    for picture in pictures:
        edges = [picture[0], picture[-1], picture[:, 0], picture[:, -1]]
        assert picture.std() > 0.1 and all((edge == 1).all() for edge in edges), "blank, or something is cut off"


def test_the_blocks_of_the_page_run():
    """Each by itself, the planner's without torch too."""
    page = (ROOT / "docs/notebook.md").read_text(encoding="utf-8")
    layer, planner = re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    without = 'import sys; sys.modules["megatron"] = sys.modules["transformers"] = None\n'
    for code in (without + layer, without + 'sys.modules["torch"] = None\n' + planner):
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    assert "8 experts on 4 ranks" in done.stdout and "1.00 planned" in done.stdout.splitlines()[-1]
    assert len(list(filter(None, planner.splitlines()))) == 5


def test_the_planner_takes_five_lines():
    assert len(code_cells()[-1].splitlines()) == 5
