"""The flags of the runs that need GPUs are taken where there is one, and refused here with a message that says so."""

import pytest

from tests.distributed.ranks import run_ranks
from tests.gpu.runs import MODEL, RUNS


def parsed(flags_and_worlds):
    """What parse_arguments says of each command line in its world, as if this machine had GPUs; None if it takes it."""
    import os

    from megatron.core.models.common.embeddings import rope_utils
    from megatron.core.transformer import transformer_config

    from hmoe_megatron import gemm, host
    from hmoe_megatron.training import parse_arguments

    host.has_gpu = lambda: True
    transformer_config.is_te_min_version = lambda *args, **kwargs: True
    fused_rope, said = rope_utils.fused_apply_rotary_pos_emb, []
    for flags, world in flags_and_worlds:
        os.environ["WORLD_SIZE"] = os.environ["LOCAL_WORLD_SIZE"] = str(world)
        te = "transformer_engine" in flags
        rope_utils.fused_apply_rotary_pos_emb = object() if te else fused_rope
        try:
            args, layout = parse_arguments([*MODEL.split(), *flags.split()])
            assert layout.compute is gemm.reference_experts and args.num_experts == 4
            said.append(None)
        except (ValueError, AssertionError) as error:
            said.append(f"{flags}: {error!r}")
    return said


def test_every_run_for_gpus_is_taken_where_there_are_gpus():
    lines = [(run.flags, run.gpus) for run in RUNS]
    lines += [(run.against, run.against_gpus) for run in RUNS if run.against is not None]
    (said,) = run_ranks(1, parsed, lines)
    assert [refused for refused in said if refused] == []


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--context-parallel-size 2 --transformer-impl local", "contradicts --transformer-impl local"),
        ("--bf16 --fp8-format hybrid --transformer-impl local", "contradicts --transformer-impl local"),
        ("--bf16 --fp8-format hybrid --fp8-param-gather", "--fp8-param-gather"),
        ("--expert-model-parallel-size 2 --moe-token-dispatcher-type flex", "add --bf16"),
        ("--expert-model-parallel-size 2 --bf16 --moe-token-dispatcher-type flex --moe-flex-dispatcher-backend ncclep",
         "--moe-flex-dispatcher-backend"),
    ],
)  # fmt: skip
def test_what_cannot_work_on_a_gpu_either_is_refused(flags, message):
    ((said,),) = run_ranks(1, parsed, [(flags, 2)])
    assert message in said
