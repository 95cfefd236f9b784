"""The doctor on machines that are broken in one known way: a bare Python plus fake packages on PYTHONPATH."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import hmoe_megatron.machine
from hmoe_megatron import patches
from hmoe_megatron.tools import machine_checks
from hmoe_megatron.tools.machine_checks import finding, machine, software
from hmoe_megatron.tools.machine_checks.finding import Finding

ROOT = Path(__file__).resolve().parents[2]
READ_OF_IT = "torch_version cuda_compiled_version nvidia_gpu_models nvidia_driver_version"
TORCH = {
    "torch/__init__.py": """
        __version__ = "2.13.0"
        class version: cuda = "13.0"
        class cuda:
            device_count = staticmethod(lambda: 0)
            class nccl: version = staticmethod(lambda: (2, 29, 7))
        """,
    "torch/distributed.py": "is_available = is_gloo_available = is_nccl_available = lambda: True",
    "torch/utils/__init__.py": "",
    "torch/utils/collect_env.py": """
        import collections
        import torch

        Env = collections.namedtuple("Env", "READ_OF_IT")
        models = None
        get_env_info = lambda: Env(torch.__version__, torch.version.cuda, models, "580.1")
        """.replace("READ_OF_IT", READ_OF_IT),
}
MEGATRON = {"megatron/core/__init__.py": '__version__ = "0.19.2"', "megatron/training/__init__.py": ""}
SOUND = TORCH | MEGATRON


@pytest.fixture(scope="session")
def bare_python(tmp_path_factory):
    """A Python with no package at all, so that what is missing is really missing."""
    home = tmp_path_factory.mktemp("bare")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(home)], check=True)
    return home / "bin/python"


@pytest.fixture
def diagnose(bare_python, tmp_path):
    def run(packages, *flags, **environment):
        for path, text in packages.items():
            file = tmp_path / "packages" / path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(textwrap.dedent(text))
        return subprocess.run(
            [bare_python, ROOT / "tools/doctor.py", *flags],
            env=os.environ | {"PYTHONPATH": str(tmp_path / "packages")} | environment,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=60,
        )

    return run


@pytest.fixture
def findings(diagnose):
    def run(packages, **environment):
        done = diagnose(packages, "--json", **environment)
        answer = json.loads(done.stdout)
        by_name = {row.pop("what"): Finding(**row) for row in answer["findings"]}
        failed = [what for what, row in by_name.items() if row.level == "fail"]
        assert done.returncode == int(bool(failed)) and answer["ok"] is not bool(failed), done.stderr
        assert list(by_name) == list(machine_checks.PROBES)
        return by_name, failed, answer["run"]

    return run


def test_sound_machine_has_no_fail_and_runs_on_gloo(findings):
    rows, failed, run = findings(SOUND)
    assert failed == []
    assert rows["torch"].found == "2.13.0, built for CUDA 13.0"
    assert rows["gpu"].found == "none"
    assert (run["backend"], run["implementation"]) == ("gloo", "local")
    assert run["off"] == ["all"] and 1 <= run["ranks"] <= machine.cores()


def test_nothing_installed_is_explained(findings):
    rows, failed, run = findings({})
    assert failed == ["torch", "megatron-core", "run"] and run is None
    assert rows["torch"] == Finding("fail", "not installed", "make venv")
    assert rows["packages"].remedy == "make venv"
    assert rows["apex"].level == rows["transformer-engine"].level == "ok"


@pytest.mark.parametrize(
    "code, said",
    [
        ("raise OSError('libcudart.so.13: cannot open shared object file')", "libcudart.so.13"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "killed by signal 11"),
        ("raise SystemExit(3)", "exit status 3"),
    ],
)
def test_torch_that_breaks_on_import_does_not_take_the_doctor_along(findings, code, said):
    rows, failed, _ = findings(MEGATRON | {"torch/__init__.py": code})
    assert failed == ["torch", "run"]
    assert said in rows["torch"].found and ".venv" in rows["torch"].remedy


def test_wrong_apex(findings):
    rows, failed, _ = findings(SOUND | {"apex/__init__.py": "import pyramid"})
    assert failed == [] and rows["apex"].level == "warn"
    assert "another project" in rows["apex"].found and rows["apex"].remedy == "pip uninstall apex"


def test_apex_without_its_extensions_is_only_a_warning(findings):
    rows, failed, _ = findings(SOUND | {"apex/__init__.py": "", "apex/multi_tensor_apply/__init__.py": ""})
    assert failed == [] and rows["apex"].level == "warn" and "--cuda_ext" in rows["apex"].remedy


def test_nvidias_apex(findings):
    rows, failed, _ = findings(SOUND | {"apex/__init__.py": "", "amp_C.py": ""})
    assert failed == [] and rows["apex"].level == "ok" and "NVIDIA's" in rows["apex"].found


HALF_ENGINE = {
    "transformer_engine/__init__.py": "raise FileNotFoundError('no transformer_engine_torch library')",
    "transformer_engine_cu13-2.9.0.dist-info/METADATA": "Metadata-Version: 2.1\n"
    "Name: transformer-engine-cu13\nVersion: 2.9.0\n",
}


def test_half_transformer_engine_is_not_used_and_leaves_megatron_whole(findings):
    asks = """
        try:
            import transformer_engine
        except ImportError:  # not the FileNotFoundError of the half
            __version__ = "0.19.2"
        """
    rows, failed, _ = findings(SOUND | HALF_ENGINE | {"megatron/core/__init__.py": asks})
    assert failed == [] and rows["megatron-core"].level == "ok"
    engine = rows["transformer-engine"]
    assert engine.level == "warn"
    assert engine.found == "transformer-engine-cu13 2.9.0, but its torch part is missing: not used"
    assert engine.remedy.startswith("pip uninstall transformer-engine-cu13;") and "[te]" in engine.remedy


def test_transformer_engine_metadata_without_module_is_half(findings):
    metadata = {path: text for path, text in HALF_ENGINE.items() if path.endswith("METADATA")}
    rows, failed, _ = findings(SOUND | metadata)
    assert failed == [] and "no module" in rows["transformer-engine"].found


def test_transformer_engine_is_whole_only_if_it_imports(findings):
    engine = {
        "transformer_engine/__init__.py": "",
        "transformer_engine/transformer_engine_torch.cpython-312.so": "",
        "transformer_engine/pytorch/__init__.py": "",
    }
    rows, failed, run = findings(SOUND | engine)
    assert failed == [] and rows["transformer-engine"].level == "ok"
    assert run["implementation"] == "local", "without a GPU Transformer Engine cannot be used"
    engine["transformer_engine/pytorch/__init__.py"] = "raise ImportError('undefined symbol: _ZN2at')"
    rows, failed, _ = findings(SOUND | engine)
    assert failed == [] and "undefined symbol" in rows["transformer-engine"].found


@pytest.mark.parametrize("version", ["0.18.0", "0.20.0rc1", "unknown"])
def test_other_megatron_on_the_path(findings, version):
    rows, failed, _ = findings(SOUND | {"megatron/core/__init__.py": f"__version__ = {version!r}"})
    assert failed == ["megatron-core"]
    assert version in rows["megatron-core"].found and "PYTHONPATH" in rows["megatron-core"].remedy


def test_broken_megatron_shows_the_error_and_a_remedy(findings):
    rows, failed, _ = findings(SOUND | {"megatron/training/__init__.py": "import no_such_module"})
    assert failed == ["megatron-core"]
    assert "no_such_module" in rows["megatron-core"].found and rows["megatron-core"].remedy == "make venv"


def test_mpi_without_its_library(findings):
    metadata = {"mpi4py-4.1.0.dist-info/METADATA": "Metadata-Version: 2.1\nName: mpi4py\nVersion: 4.1.0\n"}
    package = {"mpi4py/__init__.py": "class rc: pass", "mpi4py/MPI.py": "raise RuntimeError('no libmpi')"}
    rows, failed, _ = findings(SOUND | metadata | package)
    assert failed == [] and rows["mpi"].level == "warn" and "no libmpi" in rows["mpi"].found


LISTED = SOUND["torch/utils/collect_env.py"].replace("None", r"'GPU 0: NVIDIA H200\nGPU 1: NVIDIA H200\n'")


def test_gpu_that_the_driver_lists_and_torch_cannot_use(findings):
    rows, failed, run = findings(SOUND | {"torch/utils/collect_env.py": LISTED}, CUDA_VISIBLE_DEVICES="")
    assert failed == [] and rows["gpu"].level == "warn" and run["backend"] == "gloo"
    assert "CUDA_VISIBLE_DEVICES=''" in rows["gpu"].remedy


@pytest.mark.parametrize(
    ("ones", "level", "said"),
    [
        ("ones = lambda *_, **__: __import__('fractions').Fraction(1)", "fail", "object has no attribute 'sum'"),
        (
            "class ones:\n    __init__ = lambda *_, **__: None\n    sum = item = lambda self: self",
            "ok",
            "H200, driver 580.1",
        ),
    ],
)
def test_gpus_are_tried(findings, ones, level, said):
    torch = SOUND["torch/__init__.py"].replace("lambda: 0", "lambda: 2")
    fakes = {"torch/__init__.py": textwrap.dedent(torch) + ones, "torch/utils/collect_env.py": LISTED}
    rows, failed, run = findings(SOUND | fakes)
    assert rows["gpu"].level == level and said in rows["gpu"].found and failed == ["gpu"] * (level == "fail")
    assert level == "fail" or (run["backend"], run["ranks"]) == ("nccl", 2)


def test_torchs_report_has_what_is_read_of_it():
    collect_env = pytest.importorskip("torch.utils.collect_env", reason="torch is not installed")
    assert set(READ_OF_IT.split()) <= set(collect_env.SystemEnv._fields)


def test_patches_of_megatron_are_listed_with_their_reasons(monkeypatch, capsys):
    monkeypatch.setattr(machine_checks, "examine", lambda: {"patches": software.probe_patches()})
    monkeypatch.setattr(software, "torch_facts", lambda: ({}, "not asked"))
    assert machine_checks.report() == 0
    printed = " ".join(capsys.readouterr().out.split())
    used = {n: p for n, p in patches.listed().items() if p.kind != "cpu" or not hmoe_megatron.machine.has_gpu()}
    assert f"{len(used)} of Megatron are in use here" in printed
    assert all(f"{name}: ({patch.kind}) {patch.reason}" in printed for name, patch in used.items())


def test_console_is_one_row_a_finding_and_at_most_100_columns_wide(diagnose):
    done = diagnose(SOUND | HALF_ENGINE | {"megatron/core/__init__.py": "import transformer_engine"})
    assert done.returncode == 1
    rows = done.stdout.splitlines()
    assert max(map(len, rows)) <= 100
    heads = [row.split()[:2] for row in rows if not row.startswith(" ")]
    assert [what for _, what in heads] == list(machine_checks.PROBES)
    assert {level for level, _ in heads} <= {"ok", "warn", "fail"}


def test_long_word_is_folded_too():
    rows = machine_checks.lines("warn  disk ", "1 GiB free at /" + "z" * 300)
    assert max(map(len, rows)) <= 100 and "".join(rows).count("z") == 300


def test_probe_that_raises_hides_no_other():
    def broken():
        raise OSError("unreadable")

    good = finding.ok("2 cores")
    found = machine_checks.examine({"memory": broken, "disk": lambda: good})
    assert found["memory"].level == "warn" and "unreadable" in found["memory"].found and found["disk"] == good


def test_question_that_hangs_is_given_up():
    assert finding.ask_python("import time; time.sleep(60)", timeout_s=0.5) == ({}, "no answer within 0.5 s")


def test_answer_counts_even_if_python_then_dies():
    answer, error = finding.ask_python("import atexit, os; atexit.register(os._exit, 9); answer['x'] = 1")
    assert (answer, error) == ({"x": 1}, "")


def test_container_limits_count(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "CGROUP", tmp_path)
    (tmp_path / "memory.max").write_text(f"{3 * 2**30}\n")
    (tmp_path / "memory.current").write_text(f"{2**30}\n")
    (tmp_path / "cpu.max").write_text("100000 100000\n")
    total, available = machine.memory_bytes()
    assert total == 3 * 2**30 and available <= 2 * 2**30
    assert machine.cores() == 1 and machine.cpu_ranks() <= 1


@pytest.mark.parametrize("free_bytes, level", [(machine.MIN_SHM_BYTES - 1, "warn"), (machine.MIN_SHM_BYTES, "ok")])
def test_shared_memory_of_a_container_is_too_small(monkeypatch, free_bytes, level):
    usage = type("Usage", (), {"total": 2**40, "free": free_bytes})
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda _: usage)
    row = machine.probe_shared_memory()
    assert row.level == level and bool(row.remedy) == (level == "warn")


def test_few_open_files_are_a_warning(monkeypatch):
    monkeypatch.setattr(machine.resource, "getrlimit", lambda _: (256, 4096))
    row = machine.probe_open_files()
    assert row.level == "warn" and "4096" in row.remedy
