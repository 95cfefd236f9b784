"""Flags and environment of this machine, and that nothing of it is active where a GPU is."""

import argparse
import json
import os
import subprocess
import sys
import textwrap
import warnings

import pytest

from hmoe_megatron import machine
from hmoe_megatron.machine import flags


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch):
    monkeypatch.setattr(machine, "has_gpu", lambda: False)


@pytest.fixture(scope="module")
def megatron_parser():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from megatron.training.arguments import add_megatron_arguments

        return add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False))


def test_needed_flags_come_first_and_the_users_words_stay():
    user = ["--num-layers", "2", "--lr=1e-3", "--bf16"]
    found = machine.machine_argv(user)
    assert found[-len(user) :] == user
    assert found[: -len(user)] == [word for flag in flags.NEEDED for word in flag]
    assert machine.machine_argv(found) == found


@pytest.mark.parametrize("user", [["--distributed-backend", "gloo"], ["--distributed-backend=gloo"]])
def test_what_the_user_gave_is_not_given_twice(user):
    assert sum(word.startswith("--distributed-backend") for word in machine.machine_argv(user)) == 1


@pytest.mark.parametrize(
    "user, shown",
    [
        (["--transformer-impl", "transformer_engine"], "--transformer-impl transformer_engine"),
        (["--distributed-backend=nccl"], "--distributed-backend nccl"),
        (["--context-parallel-size", "2"], "--context-parallel-size 2"),
        (["--moe-token-dispatcher-type", "flex"], "--moe-token-dispatcher-type flex"),
        (["--fp8-format", "hybrid"], "--fp8-format hybrid"),
        (["--attention-backend", "flash"], "--attention-backend flash"),
        (["--moe-enable-deepep", "--lr", "1"], "--moe-enable-deepep"),
        (["--lr", "1", "--tp-comm-overlap"], "--tp-comm-overlap"),
        (["--profile"], "--profile"),
    ],
)
def test_a_flag_that_needs_a_gpu_is_refused_with_the_remedy(user, shown):
    with pytest.raises(ValueError) as raised:
        machine.machine_argv(user)
    message = str(raised.value)
    assert message.startswith(f"{shown}: this machine has no GPU") and "Remedy: " in message


@pytest.mark.parametrize("flag", flags.LIMITED)
def test_every_limited_flag_is_refused_and_its_allowed_values_are_not(flag):
    with pytest.raises(ValueError, match=f"^{flag}.*no GPU.*Remedy"):
        machine.machine_argv([flag, "what-no-cpu-has"] if flags.LIMITED[flag][0] else [flag])
    for value in flags.LIMITED[flag][0]:
        assert machine.machine_argv([flag, value])[-2:] == [flag, value]


def test_settings_that_a_cpu_can_have_pass():
    user = [
        "--context-parallel-size",
        "1",
        "--moe-token-dispatcher-type",
        "allgather",
        "--profile",
        "--use-pytorch-profiler",
    ]
    assert machine.machine_argv(user)[-len(user) :] == user


def test_every_flag_is_one_of_megatrons(megatron_parser):
    known = {option: action for action in megatron_parser._actions for option in action.option_strings}
    for flag, (values, _, _) in flags.LIMITED.items():
        assert flag in known
        takes_value = not isinstance(known[flag], (argparse._StoreTrueAction, argparse._StoreFalseAction))
        assert takes_value or not values
        # What Megatron has by default is not refused, or it is a flag that is always given here.
        default = getattr(known[flag].default, "name", known[flag].default)
        always_given = flag in {name for name, *_ in flags.NEEDED}
        assert default in (None, False, []) or str(default) in values or always_given
    megatron_parser.parse_args([word for flag in flags.NEEDED for word in flag])


def test_environment_is_set_where_the_user_did_not(monkeypatch):
    import torch

    for name in machine.ENVIRONMENT:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    threads = torch.get_num_threads()
    machine.prepare_environment()
    assert {**machine.ENVIRONMENT, "OMP_NUM_THREADS": "2"}.items() <= os.environ.items()
    assert torch.get_num_threads() == threads
    monkeypatch.delenv("OMP_NUM_THREADS")
    machine.prepare_environment()
    assert os.environ["OMP_NUM_THREADS"] == "1" and torch.get_num_threads() == 1


def test_the_environment_is_left_alone_where_a_gpu_is(monkeypatch):
    monkeypatch.setattr(machine, "has_gpu", lambda: True)
    monkeypatch.setattr(machine.optional, "hide_what_megatron_cannot_use", lambda has_gpu: None)
    for name in (machine.CONNECTIONS, *machine.ENVIRONMENT):
        monkeypatch.delenv(name, raising=False)
    machine.prepare_environment()
    assert not set(machine.ENVIRONMENT) & set(os.environ)
    assert os.environ[machine.CONNECTIONS] == "1", "tensor parallelism is refused without it"
    monkeypatch.setenv(machine.CONNECTIONS, "8")
    machine.prepare_environment()
    assert os.environ[machine.CONNECTIONS] == "8"


@pytest.fixture(scope="module")
def late():
    """A process that imports Megatron, applies the host as if there was a GPU, and then as there is none."""
    script = textwrap.dedent("""
        import json, sys
        import torch
        import megatron.training.training
        from megatron.core.tensor_parallel import layers
        from megatron.training import training
        from hmoe_megatron import machine, patches
        from hmoe_megatron.patches import registry
        patches.listed()

        def names():
            modules = [module for name, module in list(sys.modules.items()) if name.startswith("megatron.")]
            classes = [value for module in modules for value in vars(module).values() if type(value) is type]
            owners = [torch, torch.cuda, torch.cuda.memory, torch.cuda.random, torch.Tensor]
            owners.append(torch.distributed)
            return {(id(owner), key): id(value) for owner in owners + modules + classes
                    for key, value in list(vars(owner).items())}

        found = {}
        before, has_gpu = names(), machine.has_gpu
        machine.has_gpu = lambda: True
        found["applied with a GPU"] = patches.apply()
        found["changed with a GPU"] = len(before.items() ^ names().items())
        found["replaced with a GPU"] = len(registry.REPLACED)
        machine.has_gpu = has_gpu
        machine.prepare_environment()
        found["applied without"] = patches.apply()
        after = names()
        found["changed without"] = len(before.items() ^ after.items()) > 20
        found["again"] = patches.apply()
        found["changed again"] = len(after.items() ^ names().items())
        try:
            training.initialize_megatron()
        except AssertionError as error:
            found["late binding"] = str(error)
        torch.compiler.reset()
        from megatron.core.fusions.fused_bias_swiglu import swiglu
        swiglu(torch.ones(2, 4))
        found["compiled"] = torch._dynamo.utils.counters["stats"].get("unique_graphs", 0)
        found["available"] = torch.cuda.is_available()
        print(json.dumps(found))
    """)
    environment = {name: value for name, value in os.environ.items() if name not in machine.ENVIRONMENT}
    environment |= {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": os.pathsep.join(sys.path)}
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script], env=environment, capture_output=True, text=True, timeout=240
    )
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1])


def test_nothing_is_active_where_a_gpu_is(late):
    assert late["applied with a GPU"] is False
    assert late["changed with a GPU"] == late["replaced with a GPU"] == 0


def test_the_host_may_come_after_megatron(late):
    assert late["applied without"] is late["changed without"] is True
    assert late["late binding"] == "args is not initialized."
    assert late["compiled"] == 0


def test_a_second_apply_changes_nothing(late):
    assert late["again"] is True and late["changed again"] == 0


def test_torch_goes_on_saying_that_there_is_no_gpu(late):
    assert late["available"] is False
