"""The rooms of the package: imports point one way, files stay small, nothing in the package needs a tool."""

import ast
import statistics
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "hmoe_megatron"
FILES = sorted(PACKAGE.rglob("*.py"))
TOOLS = sorted((ROOT / "tools").rglob("*.py"))
LINES = {path: path.read_text().count("\n") for path in FILES}


def imported(path: Path, inside_functions: bool = True) -> set[str]:
    """Dotted names of ours that a file imports, relative ones made whole, with the names taken out of them."""
    tree = ast.parse(path.read_text())
    nodes = ast.walk(tree) if inside_functions else tree.body
    names = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = path.relative_to(ROOT).parts[: -node.level] if node.level else ()
            module = ".".join([*above, *([node.module] if node.module else [])])
            names |= {module} | {f"{module}.{alias.name}" for alias in node.names}
    return {name for name in names if name.startswith("hmoe_megatron.")}


def room(dotted: str) -> str:
    """`moe` of hmoe_megatron.moe.layer, `widths` of hmoe_megatron.widths."""
    return dotted.split(".")[1]


def graph(of) -> dict[str, set[str]]:
    """Room or module -> those that it imports."""
    edges: dict[str, set[str]] = {}
    for path in FILES:
        own = of(".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"))
        found = {of(name) for name in imported(path)}
        edges.setdefault(own, set()).update(found - {own})
    return edges


def test_rooms_import_one_way():
    edges = graph(lambda dotted: room(dotted) if "." in dotted else "hmoe_megatron")
    order = list(TopologicalSorter(edges).static_order())  # CycleError names the circle
    assert order.index("moe") > order.index("placement") > order.index("untrusted")
    assert order.index("training") > order.index("checkpoint") > order.index("patches")


def test_nothing_in_the_package_needs_a_tool():
    found = [f"{path.relative_to(ROOT)}: {name}" for path in FILES for name in imported(path) if room(name) == "tools"]
    assert found == []


def test_no_module_imports_one_that_imports_it():
    """Tools too, at the top of files."""
    names = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in [*FILES, *TOOLS]}
    names = {f"hmoe_megatron.{name}" if name.startswith("tools") else name: path for name, path in names.items()}
    edges = {name: imported(path, inside_functions=False) & names.keys() for name, path in names.items()}
    assert len(list(TopologicalSorter(edges).static_order())) == len(names)


def test_files_are_small():
    assert {str(path.relative_to(ROOT)): lines for path, lines in LINES.items() if lines > 400} == {}
    assert statistics.median(LINES.values()) < 150
    assert sum(LINES.values()) <= 17_600
    assert len(list(PACKAGE.glob("*.py"))) <= 12


@pytest.mark.parametrize("path", TOOLS, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_tool_is_small(path):
    assert path.read_text().count("\n") <= 400
