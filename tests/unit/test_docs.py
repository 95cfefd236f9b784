"""README and docs say what the code does: flags, make targets, paths, generated pages."""

import argparse
import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest

from hmoe_megatron.command_line import add_arguments
from hmoe_megatron.config import flags_document

ROOT = Path(__file__).parents[2]
DOCUMENTS = sorted(
    [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("examples/**/*.md"), *ROOT.glob("benchmarks/*.md")]
)
TOOL_FLAGS = re.compile(r"add(?:_argument)?\(\s*\"(--[a-z-]+)\"")


def known_flags():
    from megatron.training.arguments import add_megatron_arguments

    parser = add_arguments(add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False)))
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


def test_the_map_of_the_package_is_whole():
    table = (ROOT / "CONTRIBUTING.md").read_text()
    named = set(re.findall(r"`([a-z_]+(?:/[a-z_.]+)*\.py|[a-z_/]+/)`", table))
    for path in named:
        assert (ROOT / path).exists() or (ROOT / "tests" / path).exists(), path
    package = ROOT / "hmoe_megatron"
    modules = {f"hmoe_megatron/{p.name}" for p in package.glob("*.py") if p.name != "__init__.py"}
    packages = {f"hmoe_megatron/{p.parent.name}/" for p in package.glob("*/__init__.py")}
    assert modules | packages <= named


def blocks(language):
    """Of the README, as they stand."""
    return re.findall(rf"^```{language}\n(.*?)^```$", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)


def test_the_planner_from_python_as_the_readme_has_it():
    (block,) = blocks("python")
    done = subprocess.run([sys.executable, "-c", block], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "layer 0: 4 experts on 2 ranks" in done.stdout and done.stdout.splitlines()[-1].endswith("over mean 1.00")


@pytest.mark.campaign
def test_training_on_ones_own_text_as_the_readme_has_it(tmp_path):
    """All commands of the block, in a directory that has the project's files and a corpus.jsonl."""
    (block,) = blocks("bash")
    for path in ROOT.iterdir():
        if path.name in ("tools", "examples", "hmoe_megatron", "pretrain_hmoe.py"):
            (tmp_path / path.name).symlink_to(path)
    words = "once upon a time there was an expert whose width was not that of the others".split()
    texts = [" ".join(random.Random(seed).choices(words, k=60)) for seed in range(400)]
    (tmp_path / "corpus.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    command = ["bash", "-euo", "pipefail", "-c", block.replace("--vocab-size 1024", "--vocab-size 320")]
    done = subprocess.run(command, cwd=tmp_path, env=os.environ | {"PATH": path}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "runs/a/latest_checkpointed_iteration.txt").read_text() == "40"


def test_links_lead_somewhere():
    for path in DOCUMENTS:
        for link in re.findall(r"\]\(([^)#:]+)\)", path.read_text()):
            assert (path.parent / link).exists(), f"{path}: {link}"
