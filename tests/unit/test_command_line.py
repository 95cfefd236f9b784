"""What a user sees of pretrain_hmoe.py who asks for help, mistypes a flag or takes the wrong Python."""

import dataclasses
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hmoe_megatron.command_line import short_help
from hmoe_megatron.config import HMoEConfig, flag_of
from tests.distributed.pretrain_run import said_by
from tests.distributed.ranks import run_alone

ROOT = Path(__file__).parents[2]


def started(*words, **more):
    command = [*words] if words[0] == sys.executable else [sys.executable, ROOT / "pretrain_hmoe.py", *words]
    return subprocess.run(command, capture_output=True, text=True, **more)


def test_help_is_short_names_every_flag_and_fits_a_terminal():
    lines = short_help().splitlines()
    assert len(lines) <= 70 and max(map(len, lines)) <= 100
    first = [line.split()[0] for line in lines if line.startswith("  --hmoe-")]
    assert first == [flag_of(field.name) for field in dataclasses.fields(HMoEConfig)]


def test_help_comes_at_once_and_without_torch():
    began_s = time.process_time()
    ended = started("--help")
    assert ended.returncode == 0 and ended.stdout == short_help() and ended.stderr == ""
    probe = "import sys; sys.argv = ['x', '--help']; import pretrain_hmoe as p; p.main(); print('torch' in sys.modules)"
    assert started(sys.executable, "-c", probe, cwd=ROOT).stdout.splitlines()[-1] == "False"
    assert time.process_time() - began_s < 5


def test_a_python_without_the_packages_says_so_in_one_line():
    # -S: without site-packages; numpy is the first that is missing
    ended = started(sys.executable, "-S", ROOT / "pretrain_hmoe.py", "--num-layers", "2")
    assert ended.returncode == 2 and ended.stdout == ""
    (line,) = ended.stderr.splitlines()
    assert f"{sys.executable} has no" in line and "pip install -e ." in line


def said_of(words):
    from hmoe_megatron.training import parse_arguments

    return said_by(lambda: parse_arguments(words))


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--hmoe-width", "equal"], "  --hmoe-width: no such flag; did you mean --hmoe-widths?"),
        (["--num-expert", "4", "--lr", "1"], "  --num-expert: no such flag; did you mean --num-experts?"),
        (["--qqqqqqq"], "  --qqqqqqq: no such flag"),
        (["--yaml-cfg", "a.yaml"], "argument --yaml-cfg: a.yaml: no settings are taken from YAML: give them as flags"),
        (["--lr", "much"], "argument --lr: invalid float value: 'much'"),
        (["--hmoe-router", "top"], "argument --hmoe-router: invalid choice: 'top'"),
    ],
)
def test_a_wrong_word_is_named_in_five_lines(words, expected):
    code, said = run_alone(said_of, words)
    assert code == 2 and expected in said and len(said.splitlines()) <= 5
    assert said.startswith("pretrain_hmoe.py: error: ") and "--help-all" in said
