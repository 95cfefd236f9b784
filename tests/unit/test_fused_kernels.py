"""Flags by what a GPU machine has: without Transformer Engine, with a whole and a half one, with NVIDIA's Apex and with
another project of that name. No GPU is needed: packages are stand-ins, Megatron and its parsing are real."""

import json
import os
import subprocess
import sys
import textwrap

import pytest

from hmoe_megatron.machine import fused_kernels, optional
from hmoe_megatron.machine.flags import LIMITED, gpu_argv
from hmoe_megatron.machine.fused_kernels import APEX, GRADIENT_ACCUMULATION, MASKED_SOFTMAX, Kernels, summary

NONE = Kernels("", "not installed", frozenset(), True)
ENGINE = Kernels("2.20.2", "", frozenset(), True)
BOTH = ENGINE._replace(modules=frozenset((*GRADIENT_ACCUMULATION, *MASKED_SOFTMAX, APEX)))
ONLY_APEX = BOTH._replace(engine="", no_engine="not installed")
NO_COMPILER = NONE._replace(compiler=False)
LOCAL = ["--transformer-impl", "local"]
ACCUMULATION, SOFTMAX = "--no-gradient-accumulation-fusion", "--no-masked-softmax-fusion"
ROPE, NORM, SWIGLU = "--no-rope-fusion", "--no-persist-layer-norm", "--no-bias-swiglu-fusion"


@pytest.mark.parametrize(
    ("kernels", "flags"),
    [
        (NONE, [*LOCAL, ROPE, ACCUMULATION, SOFTMAX, NORM]),
        (ENGINE, ["--transformer-impl", "transformer_engine", ACCUMULATION]),
        (BOTH, ["--transformer-impl", "transformer_engine"]),
        (ONLY_APEX, [*LOCAL, ROPE, NORM]),
        (NO_COMPILER, [*LOCAL, ROPE, ACCUMULATION, SOFTMAX, NORM, SWIGLU]),
    ],
)
def test_flags_that_a_gpu_machine_needs(kernels, flags):
    user = ["--normalization", "RMSNorm", "--bf16"]
    found = gpu_argv(user, kernels)
    assert found == flags + user
    assert gpu_argv(found, kernels) == found, "once is enough"


def test_apexs_layer_norm_stays_fused():
    assert NORM not in gpu_argv([], ONLY_APEX) and NORM in gpu_argv([], NONE)


def test_what_the_user_gave_wins():
    assert gpu_argv(LOCAL, ENGINE) == [ACCUMULATION, SOFTMAX, NORM, *LOCAL], "rope fusion is Transformer Engine's"
    assert gpu_argv([ROPE], BOTH) == ["--transformer-impl", "transformer_engine", ROPE]
    assert gpu_argv(["--transformer-impl=local"], BOTH)[-1] == "--transformer-impl=local"


NEED_ENGINE = [
    "--transformer-impl transformer_engine",
    "--fp8-format hybrid",
    "--context-parallel-size 2",
    "--moe-permute-fusion",
    "--moe-router-fusion",
    "--use-precision-aware-optimizer",
    "--tp-comm-overlap",
    "--cross-entropy-fusion-impl te",
    "--te-rng-tracker",
    "--fused-residual-rmsnorm",
]


@pytest.mark.parametrize("flag", NEED_ENGINE)
def test_a_flag_that_needs_the_engine_is_refused_without_it_and_taken_with_it(flag):
    half = NONE._replace(no_engine="transformer-engine-cu13 2.9.0, but its torch part is missing")
    with pytest.raises(ValueError) as refused:
        gpu_argv(flag.split(), half)
    message = str(refused.value)
    assert message.startswith(f"{flag}: it needs Transformer Engine, and Transformer Engine is transformer-engine-cu13")
    assert "Remedy: " in message and "make doctor" in message
    assert gpu_argv(flag.split(), ENGINE)[-1] == flag.split()[-1]


def test_what_needs_a_gpu_only_is_taken_where_there_is_one():
    for flag in ("--moe-enable-deepep", "--log-straggler", "--moe-token-dispatcher-type"):
        assert flag in LIMITED and flag in gpu_argv([flag], NONE)
    assert gpu_argv(["--context-parallel-size", "1"], NONE)[-1] == "1"


def test_the_summary_says_what_and_why():
    assert summary(ENGINE, {}) == (
        "implementation transformer_engine (Transformer Engine 2.20.2); fused kernels "
        "without gradient accumulation (needs NVIDIA's Apex)"
    )
    assert summary(BOTH, {}).endswith("; fused kernels all on")
    said = summary(NONE, {"--normalization": "RMSNorm"})
    assert said.startswith("implementation local (Transformer Engine: not installed); fused kernels without rope (")
    assert "\n" not in said


# --- packages that are there, as files

METADATA = "Metadata-Version: 2.1\nName: {}\nVersion: {}\n"
WHOLE = {
    "transformer_engine/__init__.py": """
        import importlib.abc, importlib.machinery, sys, types
        __version__ = "2.20.2"
        def anything(self, name):
            if name.startswith("__"):
                raise AttributeError(name)
            value = AnyClass(name, (), {})
            setattr(self, name, value)
            return value
        AnyClass = type("AnyClass", (type,), {"__getattr__": anything})
        AnyModule = type("AnyModule", (types.ModuleType,), {"__getattr__": anything})
        class Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
            def find_spec(self, name, path, target=None):
                if name.startswith("transformer_engine.") or name == "transformer_engine_torch":
                    return importlib.machinery.ModuleSpec(name, self, is_package=True)
            def create_module(self, spec):
                return AnyModule(spec.name)
            def exec_module(self, module):
                pass
        sys.meta_path.insert(0, Finder())
        from transformer_engine import common, pytorch
        """,
    "transformer_engine/wheel_lib/transformer_engine_torch.so": "",
    "transformer_engine-2.20.2.dist-info/METADATA": METADATA.format("transformer-engine", "2.20.2"),
}
HALF = {
    "transformer_engine/__init__.py": "raise FileNotFoundError('no transformer_engine_torch library')",
    "transformer_engine_cu13-2.9.0.dist-info/METADATA": METADATA.format("transformer-engine-cu13", "2.9.0"),
}
BROKEN = WHOLE | {"transformer_engine/__init__.py": "raise ImportError('undefined symbol: _ZN2at')"}
NVIDIAS = {
    "apex/__init__.py": "",
    "amp_C.py": "multi_tensor_l2norm = multi_tensor_scale = None",
    "apex/multi_tensor_apply/__init__.py": "multi_tensor_applier = None",
    "apex/optimizers/__init__.py": "class FusedAdam: pass\nclass FusedSGD: pass",
    "fused_weight_gradient_mlp_cuda.py": "",
} | {f"{name}.py": "" for name in MASKED_SOFTMAX}
PYRAMIDS = {"apex/__init__.py": ""}
SCRIPT = """
    import json, os, sys, warnings
    warnings.simplefilter("ignore")
    from hmoe_megatron import machine
    machine.has_gpu = lambda: True
    machine.prepare_environment()
    from hmoe_megatron import training
    from benchmarks.gpu.runs import MODEL
    machine.has_gpu = lambda: False
    training.prepare()                      # so that what follows runs without a GPU
    machine.has_gpu = lambda: True
    from megatron.core.models.gpt import gpt_layer_specs
    from megatron.core.optimizer import distrib_optimizer
    found = {"adam": distrib_optimizer.HAVE_APEX_OR_TE, "apex": gpt_layer_specs.HAVE_APEX,
             "engine": gpt_layer_specs.HAVE_TE}
    args, layout, _ = training.parse_arguments([*MODEL.split(), *sys.argv[1:]])
    found |= {name: getattr(args, name) for name in ("transformer_impl", "apply_rope_fusion",
              "gradient_accumulation_fusion", "masked_softmax_fusion", "no_persist_layer_norm")}
    found["line"] = machine.machine_line(args)
    try:
        training.parse_arguments([*MODEL.split(), "--transformer-impl", "transformer_engine"])
    except ValueError as error:
        found["refused"] = str(error)
    print(json.dumps(found))
    """


def write(folder, packages):
    for path, text in packages.items():
        file = folder / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(textwrap.dedent(text))


@pytest.fixture
def start(tmp_path):
    """(files of packages, flags) -> what a start with them on a machine with a GPU finds and does."""

    def run(packages, *flags):
        write(tmp_path, packages)
        paths = os.pathsep.join([str(tmp_path), *sys.path])
        environment = os.environ | {"PYTHONPATH": paths, "CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "0"}
        done = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(SCRIPT), *flags],
            env=environment,
            capture_output=True,
            text=True,
            timeout=240,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return json.loads(done.stdout.splitlines()[-1])

    return run


@pytest.mark.parametrize(
    ("packages", "words"),
    [
        pytest.param(
            HALF,
            "transformer-engine-cu13 2.9.0, but its torch part is missing",
            id="half an engine",
            marks=pytest.mark.campaign,
        ),
        pytest.param(PYRAMIDS, "not installed", id="no engine, another apex", marks=pytest.mark.campaign),
    ],
)
def test_a_start_without_the_kernels(start, packages, words):
    found = start(packages)
    assert not (found["engine"] or found["apex"] or found["adam"]), "Megatron sees none of it"
    assert found["transformer_impl"] == "local" and found["no_persist_layer_norm"]
    assert not (found["apply_rope_fusion"] or found["gradient_accumulation_fusion"] or found["masked_softmax_fusion"])
    assert words in found["line"] and found["line"].startswith("implementation local (")
    assert found["refused"].startswith(
        f"--transformer-impl transformer_engine: it needs Transformer Engine, and Transformer Engine is {words}"
    )


def test_a_start_with_the_engine(start):
    found = start(WHOLE, "--fp8-format", "hybrid", "--bf16")
    assert found["engine"] and found["transformer_impl"] == "transformer_engine" and found["apply_rope_fusion"]
    assert "refused" not in found
    assert not found["gradient_accumulation_fusion"], "the output layer's linear needs Apex for it"
    assert "Transformer Engine 2.20.2" in found["line"]


@pytest.mark.campaign
def test_a_start_with_nvidias_apex(start):
    found = start(NVIDIAS)
    assert found["apex"] and found["adam"] and found["transformer_impl"] == "local"
    assert found["gradient_accumulation_fusion"] and found["masked_softmax_fusion"]
    assert found["no_persist_layer_norm"], "Apex has no RMSNorm"


@pytest.fixture
def unhidden(monkeypatch):
    """As in a process that has hidden nothing yet."""
    monkeypatch.delitem(sys.modules, "transformer_engine", raising=False)


@pytest.mark.usefixtures("unhidden")
def test_an_engine_that_does_not_import_is_not_there(tmp_path, monkeypatch):
    write(tmp_path, BROKEN)
    monkeypatch.syspath_prepend(tmp_path)
    found = optional.kernels.__wrapped__()
    assert not found.engine and "ImportError: undefined symbol: _ZN2at" in found.no_engine


@pytest.mark.usefixtures("unhidden")
def test_files_are_found_without_importing_them(tmp_path, monkeypatch):
    (tmp_path / "transformer_engine").mkdir()
    (tmp_path / "transformer_engine/__init__.py").write_text("raise AssertionError('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    assert fused_kernels.engine_files()[0] == "half"
    (tmp_path / "transformer_engine_torch.cpython-312.so").write_text("")
    assert fused_kernels.engine_files()[0] == "there"
