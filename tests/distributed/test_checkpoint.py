"""A checkpoint of one plan and layout loaded under others: weights and optimizer arrive, the next losses agree."""

import pytest
import torch

from tests.distributed.plans import WIDTHS, cut, save_plan, whole
from tests.distributed.ranks import run_ranks
from tests.distributed.test_plans import MODEL
from tests.distributed.training_run import LAYERS, TINY, build, logical_state, losses, steps

CUT = cut(((3, 0, 24), (0, 0, 16), (2, 0, 16)), ((1, 0, 32), (2, 16, 48), (3, 24, 64)))
OTHER_CUT = cut(((3, 0, 64), (2, 30, 48)), ((0, 0, 16), (1, 0, 32), (2, 0, 30)))
FOUR = cut(((3, 0, 40),), ((2, 0, 48),), ((1, 0, 32), (0, 0, 16)), ((3, 40, 64),))
EVEN = cut(((3, 0, 32), (0, 0, 16)), ((1, 0, 32), (2, 0, 48), (3, 32, 64)))
# (world, plan, flags) of the run that loads.
TARGETS = {
    "the same": (4, CUT, "--expert-model-parallel-size 2"),
    "one expert-parallel rank, two replicas": (2, whole((2, 3, 0, 1)), "--expert-model-parallel-size 1"),
    "other cuts": (2, OTHER_CUT, "--expert-model-parallel-size 2"),
    "four expert-parallel ranks": (4, FOUR, "--expert-model-parallel-size 4"),
    "tensor and expert-tensor parallel": (
        4, EVEN, "--expert-model-parallel-size 2 --tensor-model-parallel-size 2 --sequence-parallel "
        "--expert-tensor-parallel-size 2 --moe-token-dispatcher-type alltoall"),
    "pipeline parallel": (4, CUT, "--expert-model-parallel-size 2 --pipeline-model-parallel-size 2"),
}  # fmt: skip
OPTIMIZERS = {"adam": "", "distributed": "--use-distributed-optimizer"}
# Two steps at a learning rate of 1e-2; sums are in another order: 2 ulp of the loss.
BOUND = 2.4e-7


def flags(optimizer, plan, layout):
    return (f"{MODEL} --make-vocab-size-divisible-by 1 {OPTIMIZERS[optimizer]} --hmoe-placement {plan} {layout} "
            "--no-load-rng")  # fmt: skip


@pytest.fixture(scope="module", params=OPTIMIZERS)
def saved(request, tmp_path_factory):
    """(optimizer, checkpoint of step 2, its weights, losses of steps 3 and 4 of the run that went on)."""
    folder = tmp_path_factory.mktemp(request.param)
    given = flags(request.param, save_plan(folder / "plan.json", *[CUT] * LAYERS), "--expert-model-parallel-size 2")
    unbroken = run_ranks(4, steps, given, 4)
    first = run_ranks(4, steps, f"{given} --save {folder / 'checkpoint'} --save-interval 1000", 2, save=True)
    assert losses(first) == losses(unbroken)[:2]
    return request.param, folder / "checkpoint", logical_state(first), losses(unbroken)[2:]


@pytest.mark.parametrize("target", TARGETS)
def test_any_plan_loads_any_other(saved, target, tmp_path):
    optimizer, checkpoint, weights, expected = saved
    world, pieces, layout = TARGETS[target]
    given = flags(optimizer, save_plan(tmp_path / "plan.json", *[pieces] * LAYERS), f"{layout} --load {checkpoint}")
    if "--tensor" not in layout:
        loaded = logical_state(run_ranks(world, steps, given, 0, skip=2))
        assert [name for name in weights if not torch.equal(loaded[name], weights[name])] == []
    resumed = losses(run_ranks(world, steps, given, 2, skip=2))
    assert resumed == (expected if target == "the same" else pytest.approx(expected, rel=BOUND))


def main_shards(given):
    """(key, offset, shape) of the expert shards that this rank writes: of its replicas the first."""
    from megatron.core.dist_checkpointing.mapping import apply_factories, is_main_replica

    _, _, model = build([*TINY, *given.split()])
    state = model.sharded_state_dict()
    apply_factories(state)
    shards = [shard for name, shard in state.items() if ".experts." in name and is_main_replica(shard.replica_id)]
    return [(shard.key, shard.global_offset, shard.local_shape) for shard in shards]


@pytest.mark.parametrize("layout", ["", "--tensor-model-parallel-size 2 --sequence-parallel "
                                    "--moe-token-dispatcher-type alltoall"])  # fmt: skip
def test_every_width_unit_is_written_by_one_rank(tmp_path, layout):
    """EP 2: two replicas of every piece, or, with tensor parallel, two halves of it."""
    plan = save_plan(tmp_path / "plan.json", *[EVEN] * LAYERS)
    given = f"{MODEL} --hmoe-placement {plan} --expert-model-parallel-size 2 {layout}"
    written = {}
    for key, offset, shape in (shard for rank in run_ranks(4, main_shards, given) for shard in rank):
        axis = 1  # of [2, F, H] and of [H, F]
        written.setdefault(key, []).extend(range(offset[axis], offset[axis] + shape[axis]))
    assert len(written) == 2 * len(WIDTHS) * LAYERS
    for key, units in written.items():
        expert = int(key.split(".")[-3])
        assert sorted(units) == list(range(WIDTHS[expert])), key
