"""README and docs say what the code does: flags, make targets, paths, generated pages."""

import argparse
import re
from pathlib import Path

import pytest

from hmoe_megatron.config import add_hmoe_arguments, flags_document

ROOT = Path(__file__).parents[2]
DOCUMENTS = sorted(
    [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("examples/**/*.md"), *ROOT.glob("benchmarks/*.md")]
)
TOOL_FLAGS = re.compile(r"add(?:_argument)?\(\s*\"(--[a-z-]+)\"")


def known_flags():
    from megatron.training.arguments import add_megatron_arguments

    parser = add_hmoe_arguments(add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False)))
    flags = {option for action in parser._actions for option in action.option_strings}
    for source in [*ROOT.glob("tools/*.py"), *ROOT.glob("examples/*.py"), *ROOT.glob("benchmarks/*.py")]:
        flags |= set(TOOL_FLAGS.findall(source.read_text()))
    torchrun = {"--nproc-per-node", "--standalone", "--nnodes", "--max-restarts", "--local-addr"}
    torchrun |= {f"--rdzv-{name}" for name in ("backend", "endpoint", "conf")}
    return flags | torchrun | {"--nodes", "--mpi", "--help"}  # of sbatch and srun


def test_documents_are_found():
    assert {"README.md", "flags.md"} <= {path.name for path in DOCUMENTS}


def test_flags_page_is_up_to_date():
    assert (ROOT / "docs" / "flags.md").read_text() == flags_document()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_every_flag_in_the_documents_exists():
    known = known_flags()
    flag = re.compile(r"(?<![\w-])--[a-z][a-z0-9_-]+[a-z0-9]")
    texts = {str(path.relative_to(ROOT)): path.read_text().replace("--hmoe-*", "") for path in DOCUMENTS}
    named = {(name, found) for name, text in texts.items() for found in flag.findall(text)}
    assert {("README.md", "--hmoe-top-p"), ("README.md", "--append-eod")} <= named
    assert {(name, flag) for name, flag in named if flag not in known} == set()


def test_every_make_target_in_the_documents_exists():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for path in DOCUMENTS:
        named = set(re.findall(r"(?:`|^)make ([a-z-]+)", path.read_text(), re.MULTILINE))
        assert named <= targets, f"{path}: {named - targets}"


def test_the_map_of_the_readme_is_whole():
    text = (ROOT / "README.md").read_text()
    table = text[text.index("## Where things are") :]
    named = set(re.findall(r"`([a-z_]+(?:/[a-z_.]+)*\.py|[a-z_/]+/)`", table))
    for path in named:
        assert (ROOT / path).exists() or (ROOT / "tests" / path).exists(), path
    package = ROOT / "hmoe_megatron"
    modules = {f"hmoe_megatron/{p.name}" for p in package.glob("*.py") if p.name != "__init__.py"}
    packages = {f"hmoe_megatron/{p.parent.name}/" for p in package.glob("*/__init__.py")}
    assert modules | packages <= named


def test_links_lead_somewhere():
    for path in DOCUMENTS:
        for link in re.findall(r"\]\(([^)#:]+)\)", path.read_text()):
            assert (path.parent / link).exists(), f"{path}: {link}"
