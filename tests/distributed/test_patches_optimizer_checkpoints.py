"""Optimizer state through a checkpoint where buckets end in padding and ranks hold no expert: what stock Megatron
loses, and that the repaired one loses nothing. With torch's Adam and with a stand-in for the fused ones."""

import pytest
import torch
from torch.distributed.checkpoint.api import CheckpointException

from tests.distributed.plans import save_plan, whole
from tests.distributed.ranks import run_ranks
from tests.distributed.test_plans import MODEL
from tests.distributed.training_run import LAYERS, UNCLIPPED, logical_state, losses, steps
from tests.rows import rarely

BOTH, FIRST_EMPTY, SECOND_EMPTY = whole((3, 0), (1, 2)), whole((), (0, 1, 2, 3)), whole((0, 1, 2, 3), ())
OPTIMIZERS = ["", "--bf16", "--use-distributed-optimizer", "--bf16 --use-distributed-optimizer"]
MANY_BUCKETS = "--use-distributed-optimizer --overlap-grad-reduce --ddp-bucket-size 1"
STOCK, FUSED = "stock", "fused"


class FusedAdam(torch.optim.Optimizer):
    """Keeps its state as Transformer Engine's and Apex's FusedAdam do: one int ``step`` a group, none for a group
    without parameters, and ``exp_avg`` and ``exp_avg_sq`` of each parameter. For tests without a GPU."""

    def __init__(self, params, lr, betas, eps, weight_decay, capturable, adam_w_mode):
        assert adam_w_mode and not capturable
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            if not group["params"]:
                continue
            group["step"] = group.get("step", 0) + 1
            (beta1, beta2), lr, step = group["betas"], group["lr"], group["step"]
            for parameter in group["params"]:
                state, grad = self.state[parameter], parameter.grad
                for name, beta, value in (("exp_avg", beta1, grad), ("exp_avg_sq", beta2, grad.square())):
                    state.setdefault(name, torch.zeros_like(parameter)).mul_(beta).add_(value, alpha=1 - beta)
                deviation = (state["exp_avg_sq"] / (1 - beta2**step)).sqrt().add_(group["eps"])
                parameter.mul_(1 - lr * group["weight_decay"])
                parameter.addcdiv_(state["exp_avg"], deviation, value=-lr / (1 - beta1**step))


def steps_with(changes, *args, **kwargs):
    """``steps`` of a rank, with STOCK without the repairs, with FUSED as if a fused Adam were installed."""
    from megatron.core import optimizer
    from megatron.core.optimizer import distrib_optimizer

    from hmoe_megatron.patches import registry

    if STOCK in changes:
        registry.DONE["optimizer_checkpoints"] = False
    if FUSED in changes:
        optimizer.Adam = distrib_optimizer.Adam = FusedAdam
        optimizer.USING_PYTORCH_OPTIMIZER = False
        distrib_optimizer.HAVE_APEX_OR_TE = distrib_optimizer.USING_APEX_OPTIMIZER = True
    return steps(*args, **kwargs)


def run(folder, pieces, flags, count, changes=(), load=None, save=None, **more):
    """Two ranks, expert-parallel size 2, one plan for all layers; load and save: names of checkpoints in folder."""
    plan = save_plan(folder / "plan.json", *[pieces] * LAYERS)
    given = f"{MODEL} {UNCLIPPED} {flags} --expert-model-parallel-size 2 --hmoe-placement {plan}"
    given += f" --load {folder / load}" if load else ""
    given += f" --save {folder / save} --save-interval 1000" if save else ""
    return run_ranks(2, steps_with, changes, given, count, save=save is not None, **more)


def states(ranks):
    """{(kind, logical name): tensor} of everything the optimizers hold."""
    kinds = {kind for rank in ranks for kind in rank["optimizer"]}
    found = {kind: [rank["optimizer"][kind] for rank in ranks if kind in rank["optimizer"]] for kind in kinds}
    return {(kind, name): value for kind, parts in found.items() for name, value in logical_state(parts).items()}


def different(ranks, others):
    state, other = states(ranks), states(others)
    assert state.keys() == other.keys()
    return sorted(name for name in state if not torch.equal(state[name], other[name]))


def loaded(ranks):
    return [rank["loaded"] for rank in ranks]


def test_stock_saves_the_state_of_neighbours_where_buckets_end_in_padding(tmp_path):
    """The repaired: tests/distributed/test_checkpoint.py, among others under many buckets."""
    before = run(tmp_path, BOTH, MANY_BUCKETS, 2, [STOCK], save="stock")
    wrong = {name for _, name in different(loaded(run(tmp_path, BOTH, MANY_BUCKETS, 0, load="stock", skip=2)), before)}
    # The buffer runs from the last layer to the first: only what lies before the first padding is right.
    assert "embedding.word_embeddings.weight" in wrong and "output_layer.weight" not in wrong
    assert len(wrong) > 5


@pytest.mark.parametrize("changes", [(FUSED,), *rarely(((),))], ids=["fused Adam", "torch's Adam"])
@pytest.mark.parametrize("optimizer", [OPTIMIZERS[3], *rarely(*OPTIMIZERS[:3])])
def test_ranks_without_experts_save_and_load(tmp_path, optimizer, changes):
    """Both ranks have experts, then the second only, then the first only."""
    first = run(tmp_path, BOTH, optimizer, 2, changes, save="first", after=2)
    second = run(tmp_path, FIRST_EMPTY, optimizer, 1, changes, load="first", save="second", skip=2)
    third = run(tmp_path, SECOND_EMPTY, optimizer, 1, changes, load="second", skip=3)
    assert different(loaded(second), first) == [] and different(loaded(third), second) == []
    assert losses(second) + losses(third) == losses(first)[2:]
    assert [rank["adam_steps"] for rank in [*first, *loaded(second), *loaded(third)]] == [[2]] * 4 + [[3]] * 2


@pytest.mark.parametrize(
    ("optimizer", "count"),
    [
        *rarely(("", 0), ("--fp16", 1)),  # it skips the step: the first loss scale is 2**32
        ("--fp16 --use-distributed-optimizer", 1),
    ],
)
def test_a_checkpoint_from_before_the_first_step(tmp_path, optimizer, count):
    first = run(tmp_path, BOTH, optimizer, count, save="first", after=2)
    second = run(tmp_path, FIRST_EMPTY, optimizer, 2, load="first", skip=count)
    assert losses(second) == losses(first)[count:]
    assert {tuple(rank["adam_steps"]) for rank in [*first, *loaded(second)]} <= {(), (0,)}
    assert not any(value.any() for (kind, _), value in states(loaded(second)).items() if kind != "param")


def test_stock_cannot_load_from_before_the_first_step(tmp_path):
    run(tmp_path, BOTH, "", 0, [STOCK], save="stock")
    with pytest.raises(CheckpointException):
        run(tmp_path, BOTH, "", 0, [STOCK], load="stock")


def test_stock_has_no_state_for_a_rank_without_experts_with_a_fused_adam(tmp_path):
    run(tmp_path, BOTH, "", 1, [STOCK, FUSED], save="stock")
    with pytest.raises(KeyError, match="state"):
        run(tmp_path, FIRST_EMPTY, "", 0, [STOCK, FUSED], load="stock", skip=1)


def test_stock_loses_the_step_where_rank_0_holds_no_expert(tmp_path):
    run(tmp_path, FIRST_EMPTY, "", 2, [STOCK], save="stock")
    with pytest.raises(KeyError, match="step"):
        run(tmp_path, BOTH, "", 0, [STOCK], load="stock", skip=2)


def test_stock_begins_again_at_step_1_with_a_fused_adam(tmp_path):
    first = run(tmp_path, FIRST_EMPTY, "", 2, [STOCK, FUSED], save="stock", after=2)
    second = run(tmp_path, BOTH, "", 2, [STOCK, FUSED], load="stock", skip=2)
    assert different(loaded(second), first) == []
    assert losses(second)[0] == losses(first)[2] and losses(second)[1] != losses(first)[3]


@pytest.mark.parametrize(
    ("before", "after", "error", "message"),
    [
        (FIRST_EMPTY, BOTH, ValueError, "Cannot merge two lists with different lengths"),
        (BOTH, FIRST_EMPTY, KeyError, "fp32_from_fp16"),
    ],
    ids=["rank 0 had none", "rank 0 has none"],
)
def test_stock_cannot_load_masters_where_a_rank_holds_no_expert(tmp_path, before, after, error, message):
    run(tmp_path, before, "--bf16", 1, [STOCK], save="stock")
    with pytest.raises(error, match=message):
        run(tmp_path, after, "--bf16", 0, [STOCK], load="stock", skip=1)
