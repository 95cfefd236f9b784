"""setup.py against the lock, the choice of a Python, and a .venv that is made once: all with fake Pythons."""

import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import setuptools
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
TOOLS = "/usr/bin:/bin"


@pytest.fixture(scope="module")
def setup_arguments():
    given = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(setuptools, "setup", given.update)
        patch.chdir(ROOT)
        runpy.run_path(str(ROOT / "setup.py"))
    return given


@pytest.fixture(scope="module")
def locked():
    rows = [row for row in (ROOT / "requirements.lock").read_text().splitlines() if not row.startswith("#")]
    assert rows == sorted(rows, key=str.lower)
    pins = dict(re.fullmatch(r"([\w.-]+)==([\w.]+)", row).groups() for row in rows)
    assert len(pins) == len(rows), "a package is pinned twice"
    return {canonicalize_name(name): version for name, version in pins.items()}


def test_lock_satisfies_setup(setup_arguments, locked):
    extras = setup_arguments["extras_require"]
    for text in setup_arguments["install_requires"] + extras["dev"] + extras["hf"]:
        wanted = Requirement(text)
        assert wanted.specifier.contains(locked[canonicalize_name(wanted.name)]), text


def test_megatron_core_is_the_one_that_is_patched(setup_arguments):
    """hmoe_megatron/patches/ is of this version: a newer or older one must not come in by itself."""
    (wanted,) = (Requirement(text) for text in setup_arguments["install_requires"] if "megatron-core" in text)
    assert [wanted.specifier.contains(version) for version in ("0.19.1", "0.19.2", "0.20.0")] == [False, True, False]


def test_only_our_package_is_installed(setup_arguments):
    assert "hmoe_megatron" in setup_arguments["packages"]
    assert {name.split(".")[0] for name in setup_arguments["packages"]} == {"hmoe_megatron"}


def test_apex_of_the_registry_is_never_asked_for(setup_arguments, locked):
    asked = sum(setup_arguments["extras_require"].values(), setup_arguments["install_requires"])
    assert "apex" not in {Requirement(text).name.lower() for text in asked} | set(locked)


# What the scripts ask of a Python: find_python.sh's probe, the base of .venv, whether it runs, venv, pip.
FAKE_PYTHON = """#!/bin/sh
case "$*" in
    "-m venv "*)
        mkdir -p "$3/bin" && cp "$0" "$3/bin/python" && touch "$3/pyvenv.cfg"
        printf '#!%s/bin/python\\n' "$3" >"$3/bin/pip" ;;
    "-m pip "*) echo "$*" >>"$PIP_LOG"; [ ! -e "$PIP_LOG.fails" ] ;;
    *find_spec*|*ensurepip*) echo "ANSWER" ;;
    *_base_executable*) echo "BASE" ;;
    "-c "*) exit 0 ;;
    *) echo "ran $*" ;;
esac
"""


def fake_python(path, answer=None, code=None):
    """A program at `path` that answers find_python.sh with `answer`, by default that it is usable."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(code or FAKE_PYTHON.replace("ANSWER", answer or f"ok {path}").replace("BASE", str(path)))
    path.chmod(0o755)
    return path


@pytest.fixture
def tools(tmp_path):
    """A PATH directory with what the scripts need, and no Python but the test's."""
    folder = tmp_path / "tools"
    folder.mkdir()
    names = "sh bash make cat cksum cp date dirname grep head mkdir mv rm sed touch expand flock"
    for name in names.split():
        found = shutil.which(name, path=TOOLS)
        if found:
            (folder / name).symlink_to(found)
    return folder


@pytest.fixture
def find_python(tmp_path, tools):
    def run(**environment):
        clean = {"PATH": str(tools), "HOME": str(tmp_path / "home")}
        script = [tools / "sh", ROOT / ".ci/find_python.sh"]
        return subprocess.run(script, env=clean | environment, capture_output=True, text=True, timeout=60)

    return run


BROKEN_SHIM = "#!/bin/sh\necho 'pyenv: python3.12: command not found' >&2\nexit 127\n"


def test_first_usable_python_is_taken(tmp_path, tools, find_python):
    fake_python(tools / "python3", "bad 3.11.2 is older than 3.12")
    fake_python(tools / "python3.12", code=BROKEN_SHIM)
    good = fake_python(tools / "python3.13")
    done = find_python()
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{good}\n", "")


@pytest.mark.parametrize("variable", ["HOME", "PYENV_ROOT"])
def test_python_that_pyenv_has_not_activated(tmp_path, tools, find_python, variable):
    fake_python(tools / "python3", code=BROKEN_SHIM)
    root = tmp_path / "home/.pyenv" if variable == "HOME" else tmp_path / "my pyenv"
    fake_python(root / "versions/3.11.7/bin/python")
    good = fake_python(root / "versions/3.12.1/bin/python")
    done = find_python(**({"PYENV_ROOT": str(root)} if variable == "PYENV_ROOT" else {}))
    assert (done.returncode, done.stdout) == (0, f"{good}\n")


def test_python_that_only_uv_knows(tmp_path, tools, find_python):
    good = fake_python(tmp_path / "uv/python3.12")
    fake_python(tools / "uv", code=f'#!/bin/sh\n[ "$1 $2" = "python find" ] && echo {good}\n')
    assert find_python().stdout == f"{good}\n"


def test_untried_version_is_the_last_choice(tmp_path, tools, find_python):
    new = fake_python(tools / "python3", f"new {tools / 'python3'}")
    assert find_python().stdout == f"{new}\n"
    good = fake_python(tools / "python3.14")
    assert find_python().stdout == f"{good}\n"


def test_no_python_says_what_was_tried_and_how_to_get_one(tools, find_python):
    fake_python(tools / "python3", "bad 3.11.2 is older than 3.12")
    fake_python(tools / "python3.12", code=BROKEN_SHIM)
    done = find_python()
    assert done.returncode == 1 and done.stdout == ""
    for words in (
        "python3: 3.11.2 is older",
        "python3.12: does not run",
        "pyenv install 3.12",
        "uv python install 3.12",
        "apt install",
        "dnf install",
        "make PYTHON=",
    ):
        assert words in done.stderr


def test_python_asked_for_is_never_replaced_by_another(tmp_path, tools, find_python):
    fake_python(tools / "python3")
    old = fake_python(tmp_path / "old", "bad 3.8.18 is older than 3.12")
    done = find_python(PYTHON=str(old))
    assert done.returncode == 1 and f"PYTHON={old}" in done.stderr and "3.8.18" in done.stderr


def test_real_python_is_judged_by_what_it_is(find_python):
    """The interpreter of a virtual environment is replaced by its base, which outlives it."""
    done = find_python(PYTHON=sys.executable)
    assert done.stdout.strip() == os.path.realpath(sys._base_executable), done.stderr


@pytest.fixture
def tree(tmp_path, tools):
    """A copy of what set-up reads, with one fake Python on PATH; returns (run make, pip's calls, folder)."""
    folder = tmp_path / "a tree"
    folder.mkdir()
    for name in ("Makefile", "setup.py", "requirements.lock"):
        shutil.copy(ROOT / name, folder)
    shutil.copytree(ROOT / ".ci", folder / ".ci")
    fake_python(tools / "python3")
    log = tmp_path / "pip.log"

    def make(*arguments, cwd=folder, **environment):
        clean = {"PATH": str(tools), "HOME": str(tmp_path / "home"), "PIP_LOG": str(log)}
        done = subprocess.run(
            [tools / "make", *arguments], env=clean | environment, cwd=cwd, capture_output=True, text=True, timeout=60
        )
        calls = log.read_text().splitlines() if log.exists() else []
        log.unlink(missing_ok=True)
        return done, calls

    return make, log, folder


def test_first_call_installs_and_second_does_not(tree):
    make, _, _ = tree
    done, calls = make("venv")
    assert done.returncode == 0, done.stderr
    assert [("-r requirements.lock" in call, "--no-deps" in call) for call in calls] == [(True, False), (False, True)]
    done, calls = make("venv")
    assert (done.returncode, done.stdout, calls) == (0, "", [])


@pytest.mark.parametrize("name", ["requirements.lock", "setup.py"])
def test_changed_requirements_are_installed(tree, name):
    make, _, folder = tree
    make("venv")
    os.utime(folder / name)
    assert make("venv")[1] == [], "a new date alone changes nothing"
    (folder / name).write_text((folder / name).read_text() + "\n# changed\n")
    done, calls = make("venv")
    assert len(calls) == 2 and "Remaking" not in done.stdout


def test_interrupted_install_is_taken_up_again(tree):
    make, log, _ = tree
    fails = Path(f"{log}.fails")
    fails.touch()
    done, calls = make("venv")
    assert done.returncode != 0 and len(calls) == 1
    fails.unlink()
    done, calls = make("venv")
    assert done.returncode == 0 and len(calls) == 2 and "Remaking" not in done.stdout


def test_copied_tree_gets_its_own_venv(tree, tmp_path):
    make, _, folder = tree
    make("venv")
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy, symlinks=True)
    done, calls = make("venv", cwd=copy)
    assert "Remaking .venv: it was moved or copied" in done.stdout and len(calls) == 2
    assert make("venv", cwd=copy)[1] == [] and make("venv")[1] == []


def test_venv_whose_python_is_gone_is_remade(tree):
    make, _, folder = tree
    make("venv")
    (folder / ".venv/bin/python").unlink()
    (folder / ".venv/bin/python").symlink_to("/nowhere/python3.12")
    done, calls = make("venv")
    assert "Remaking .venv: it has no working Python" in done.stdout and len(calls) == 2


def test_another_python_asked_for_remakes_the_venv(tree, tmp_path):
    make, _, _ = tree
    make("venv")
    other = fake_python(tmp_path / "other/python3.13")
    done, calls = make("venv", f"PYTHON={other}")
    assert f"PYTHON asks for {other}" in done.stdout and len(calls) == 2
    assert make("venv", f"PYTHON={other}")[1] == make("venv")[1] == []


def test_folder_that_is_no_venv_is_not_deleted(tree):
    make, _, folder = tree
    (folder / ".venv").mkdir()
    (folder / ".venv/thesis.txt").write_text("precious")
    done, calls = make("venv")
    assert done.returncode != 0 and calls == [] and "move it away" in done.stderr
    assert (folder / ".venv/thesis.txt").read_text() == "precious"


def test_no_python_stops_make_with_the_message(tree, tools):
    make, _, folder = tree
    (tools / "python3").unlink()
    done, calls = make("test")
    assert done.returncode != 0 and "pyenv install 3.12" in done.stderr and calls == []
    assert not (folder / ".venv").exists()


def test_make_test_and_demo_set_up_and_run(tree):
    make, _, _ = tree
    done, calls = make("test", "PYTEST_ARGS=-k plan")
    assert "ran -m pytest -n 2 --dist loadfile --no-loadscope-reorder -k plan" in done.stdout and len(calls) == 2
    done, calls = make("demo")
    assert "ran examples/demo.py" in done.stdout and calls == []


def test_help_is_the_default_and_installs_nothing(tree):
    make, _, _ = tree
    done, calls = make()
    assert calls == [] and {"venv", "demo", "test", "lint", "doctor", "lock", "clean"} <= set(done.stdout.split())


def test_ci_lints_and_then_runs_the_tests(tree, tools, tmp_path):
    make, _, folder = tree
    script = tools / "bash"
    clean = {"PATH": str(tools), "HOME": str(tmp_path), "PIP_LOG": str(tmp_path / "log"), "CI": "true"}
    done = subprocess.run(
        [script, folder / ".ci/run"], env=clean, cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    ran = [line for line in done.stdout.splitlines() if line.startswith("ran ")]
    assert ran == [
        "ran -m ruff check .",
        "ran -m ruff format --check --quiet .",
        "ran -m pytest -n 2 --dist loadfile --no-loadscope-reorder",
    ]
    assert os.access(ROOT / ".ci/run", os.X_OK)


def test_a_wheel_works_outside_the_checkout(setup_arguments, tmp_path):
    """Every command's --help, and a plan, from a directory that is not the checkout."""
    source, site = tmp_path / "source", tmp_path / "site"
    ignored = shutil.ignore_patterns("__pycache__", "*.pyc")
    for name in ("hmoe_megatron", "tools"):
        shutil.copytree(ROOT / name, source / name, ignore=ignored)
    for name in ("setup.py", "pyproject.toml", "pretrain_hmoe.py"):
        shutil.copy(ROOT / name, source / name)
    pip = [sys.executable, "-m", "pip", "-q", "install", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*pip, "--target", site, source], check=True, capture_output=True, timeout=120)
    assert (site / "hmoe_megatron/py.typed").exists() and (site / "hmoe_megatron/tools/plan_tool").is_dir()
    environment = {"PATH": TOOLS, "PYTHONPATH": str(site), "HOME": str(tmp_path)}

    def run(*words):
        return subprocess.run(
            [sys.executable, *words], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120
        )

    scripts = [line.split(" = ")[0] for line in setup_arguments["entry_points"]["console_scripts"]]
    assert {f"tools/{path.stem}" for path in ROOT.glob("tools/*.py")} == {
        line.split("hmoe_megatron.")[1].split(":")[0].replace(".", "/")
        for line in setup_arguments["entry_points"]["console_scripts"]
        if "hmoe_megatron." in line
    }
    for script in scripts:
        if script != "hmoe-pretrain":  # imports Megatron
            done = run(site / "bin" / script, "--help")
            assert done.returncode == 0 and "usage" in done.stdout, f"{script}: {done.stderr}"
    plan = ("--num-experts", "8", "--hmoe-total-width", "1024", "--expert-model-parallel-size", "2")
    done = run(site / "bin/hmoe-plan", *plan)
    assert done.returncode == 0 and "max over mean of FLOPs" in done.stdout, done.stderr
    place = "import hmoe_megatron.tools.plan_placement as p, pretrain_hmoe as q; print(p.__file__, q.__file__)"
    assert all(path.startswith(str(site)) for path in run("-c", place).stdout.split())
    (tmp_path / "x.args").write_text("--num-layers 1\n")
    done = run(
        site / "bin/hmoe-launch", "--dry-run", "--nproc-per-node", "2", "x.args", "--save", "run", "--load", "run"
    )
    assert str(site / "pretrain_hmoe.py") in done.stdout, done.stderr
