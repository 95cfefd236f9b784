"""The flags of what needs GPUs are taken where there is one, and refused here with a message that says so."""

import pytest
import torch

from benchmarks.gpu import steps
from benchmarks.gpu.runs import MODEL, RUNS
from tests.distributed.ranks import run_ranks


def parsed(flags_and_worlds, stock=False):
    """What is said of each command line in its world, as if this machine had GPUs; None if it is taken. stock: by
    Megatron of its own flags."""
    import os

    from megatron.core.models.common.embeddings import rope_utils
    from megatron.core.transformer import transformer_config
    from megatron.core.transformer.moe import moe_utils

    from benchmarks.trainer import configure
    from hmoe_megatron import machine
    from hmoe_megatron.machine.fused_kernels import Kernels
    from hmoe_megatron.moe.compute import choice

    machine.has_gpu = lambda: True
    torch.cuda.get_device_capability = lambda *device: (9, 0)
    choice._tested = lambda *given: ""
    transformer_config.is_te_min_version = lambda *args, **kwargs: True
    for name in [name for name in vars(moe_utils) if name.startswith("fused_")]:
        setattr(moe_utils, name, object())
    fused_rope, said = rope_utils.fused_apply_rotary_pos_emb, []
    from megatron.training.training import destroy_global_state

    for flags, world in flags_and_worlds:
        os.environ["WORLD_SIZE"] = os.environ["LOCAL_WORLD_SIZE"] = str(world)
        te = "local" not in flags
        machine.optional.kernels = lambda te=te: Kernels(
            "2.20.2" if te else "", "" if te else "none", frozenset(), True
        )
        rope_utils.fused_apply_rotary_pos_emb = object() if te else fused_rope
        try:
            args, _, _, layout = configure(flags.split(), stock)
            assert args.transformer_impl == ("transformer_engine" if te else "local")
            if not stock:
                wanted = "reference" if "reference" in flags else "triton, checked on this device"
                assert layout.computed_by.startswith(wanted)
            said.append(None)
        except (ValueError, AssertionError) as error:
            said.append(f"{flags}: {error!r}")
        finally:
            destroy_global_state()
    return said


def test_every_run_for_gpus_is_taken_where_there_are_gpus():
    lines = [(f"{MODEL} {run.flags}", run.gpus) for run in RUNS]
    lines += [(f"{MODEL} {run.against}", run.against_gpus) for run in RUNS if run.against is not None]
    (said,) = run_ranks(1, parsed, lines)
    assert [refused for refused in said if refused] == []


@pytest.mark.parametrize("kind", ["ours", "stock"])
def test_every_model_of_the_step_times_is_taken(kind):
    lines = [
        (flags + ("" if engine else " --transformer-impl local"), 1)
        for engine in (True, False)
        for model in steps.MODELS.values()
        for of, flags in steps.kinds(model, engine).values()
        if of == kind
    ]
    assert len(lines) == (6 if kind == "ours" else 5)
    (said,) = run_ranks(1, parsed, lines, kind == "stock")
    assert [refused for refused in said if refused] == []


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--context-parallel-size 2 --transformer-impl local", "needs Transformer Engine"),
        ("--bf16 --fp8-format hybrid --transformer-impl local", "needs Transformer Engine"),
        ("--bf16 --fp8-format hybrid --fp8-param-gather", "--fp8-param-gather"),
        ("--expert-model-parallel-size 2 --moe-token-dispatcher-type flex", "add --bf16"),
        (
            "--expert-model-parallel-size 2 --bf16 --moe-token-dispatcher-type flex "
            "--moe-flex-dispatcher-backend ncclep",
            "--moe-flex-dispatcher-backend",
        ),
    ],
)
def test_what_cannot_work_on_a_gpu_either_is_refused(flags, message):
    ((said,),) = run_ranks(1, parsed, [(f"{MODEL} {flags}", 2)])
    assert message in said
