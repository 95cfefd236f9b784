"""A resume under another layout goes on with the next sample of a real dataset, through Megatron's own loop."""

import shutil

import numpy as np
import pytest
import torch

from hmoe_megatron.tools.report.scalars import read_scalars
from tests.distributed.plans import save_plan, whole
from tests.distributed.pretrain_run import pretrain
from tests.distributed.ranks import run_ranks
from tests.distributed.test_checkpoint import BOUND, CUT, FOUR, MODEL
from tests.distributed.training_run import LAYERS, SEQUENCE, VOCABULARY
from tests.rows import rarely

STEPS, SAVED = 4, 2
FLAGS = f"{MODEL} --train-iters {STEPS} --save-interval {SAVED} --split 1,0,0"
FLAGS += " --make-vocab-size-divisible-by 1 --num-workers 0"  # ranks are not started by fork, as loaders want it


def losses(folder, data, world, layout, pieces):
    """Losses of a run that saves to folder, and goes on from the checkpoint that it finds there, by its step."""
    plan = save_plan(folder / "plan.json", *[pieces] * LAYERS)
    flags = f"{FLAGS} {layout} --hmoe-placement {plan} --data-path {data} --save {folder} --load {folder}"
    flags += f" --tensorboard-dir {folder / 'tensorboard'}"
    ended = run_ranks(world, pretrain, flags, without=("--mock-data",), timeout_s=120)
    assert {rank.code for rank in ended} == {0}
    scalar = read_scalars(folder / "tensorboard", [])["lm loss"]
    return dict(zip(scalar.x.tolist(), scalar.y.tolist(), strict=True))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Prefix of a dataset of documents of unequal length, random tokens."""
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    prefix, draw = tmp_path_factory.mktemp("data") / "text", np.random.default_rng(5)
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.int32)
    for length in draw.integers(3, 3 * SEQUENCE, size=100):
        builder.add_document(torch.from_numpy(draw.integers(0, VOCABULARY - 2, size=length)), [length])
    builder.finalize(f"{prefix}.idx")
    return prefix


@pytest.fixture(scope="module")
def unbroken(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("unbroken")
    return folder, losses(folder, data, 4, "--expert-model-parallel-size 2", CUT)


@pytest.mark.parametrize(
    ("world", "layout", "pieces"),
    [(2, "--expert-model-parallel-size 1", whole((0, 1, 2, 3))), *rarely((4, "--expert-model-parallel-size 4", FOUR))],
    ids=["two replicas", "four expert-parallel ranks"],
)
def test_the_next_samples_follow_under_another_layout(unbroken, data, tmp_path, world, layout, pieces):
    run, expected = unbroken
    name = f"iter_{SAVED:07}"
    shutil.copytree(run / name, tmp_path / name)
    (tmp_path / "latest_checkpointed_iteration.txt").write_text(str(SAVED))
    found = losses(tmp_path, data, world, layout, pieces)
    assert list(found) == list(range(SAVED + 1, STEPS + 1))
    assert found == pytest.approx({step: expected[step] for step in found}, rel=BOUND)
    assert len({round(loss, 4) for loss in expected.values()}) == STEPS, "other samples must show"
