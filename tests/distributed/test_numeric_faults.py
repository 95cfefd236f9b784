"""NaN and infinity, all tokens on one expert, experts and ranks without tokens: how a run goes on or ends."""

import math

import pytest
import torch

from tests.distributed.numeric_faults import INFINITY, BadExpert, BadLogits, OneExpert
from tests.distributed.plans import WIDTHS, cut, save_plan, whole
from tests.distributed.pretrain_run import pretrain
from tests.distributed.ranks import run_ranks
from tests.distributed.test_plans import TOKENS
from tests.distributed.training_run import EXPERTS, LAYERS, losses, steps
from tests.rows import rarely

MODEL = f"--hmoe-widths {','.join(map(str, WIDTHS))}"
TOPP = "--hmoe-router topp --hmoe-top-p 0.6"
EP2 = "--expert-model-parallel-size 2"
PP2 = "--pipeline-model-parallel-size 2"
# Two of these squared overflow float32, one does not.
OVERFLOWS_IN_PAIRS = 1.5e19
STOPPED = 17  # Megatron's code for a result that failed validation
TIMEOUT_S = 300  # far more than a run takes: a rank that hangs fails the test


def errors(ranks) -> list[str]:
    """The error lines that all ranks printed."""
    return [line for rank in ranks for line in rank.output.splitlines() if line.startswith("error: ")]


def train(world, flags, fault, count=4):
    return run_ranks(world, pretrain, f"{MODEL} --train-iters {count} {flags}", fault, timeout_s=TIMEOUT_S)


CASES = {
    "NaN in logits, first of two pipeline stages": (
        2,
        PP2,
        BadLogits(0, 2, rank=0),
        "step 2: rank 0: mlp.router in decoder layer 0 gave NaN",
    ),
    "NaN in logits once, first step, Top-P": (
        2,
        f"{EP2} {TOPP}",
        BadLogits(0, 1, rank=1, times=1),
        "step 1: rank 1: the router's logits in decoder layer 0 hold NaN or infinity. "
        "Repeating the step gave finite values",
    ),
    "NaN in logits, step not repeated": (
        2,
        f"{EP2} --rerun-mode disabled",
        BadLogits(1, 2, rank=1),
        "step 2: rank 1: the router's logits in decoder layer 1 hold NaN",
    ),
    "NaN in logits of a layer of multi-token prediction": (
        1,
        "--mtp-num-layers 1",
        BadLogits(2, 2),
        "step 2: rank 0: mlp.router in multi-token-prediction layer 2 gave NaN",
    ),
    "minus infinity in logits": (1, "", BadLogits(1, 2, value=-INFINITY), "logits in decoder layer 1 held NaN or inf"),
    "NaN in an expert's weights": (
        2,
        f"{EP2} --use-distributed-optimizer --overlap-grad-reduce",
        BadExpert([0], 3, 2, "weight"),
        "step 2: rank 0: linear_fc1_weight of expert 3 [0:64) in decoder layer 0 holds NaN",
    ),
    "infinity in a gradient": (
        2,
        EP2,
        BadExpert([1], 1, 2, "gradient", INFINITY),
        "step 2: rank 1: the gradient of linear_fc1_weight of expert 1 [0:32) in decoder layer 1 holds infinity",
    ),
    "gradient norm": (
        2,
        PP2,
        BadExpert([0, 1], 1, 2, "gradient", OVERFLOWS_IN_PAIRS),
        "step 2: rank 0: the gradient norm is inf; the largest gradient, 1.5e+19, is of linear_fc1_weight of expert 1",
    ),
}
CAMPAIGN = {
    "NaN in logits, second of two pipeline stages": (
        4,
        f"{EP2} {PP2}",
        BadLogits(1, 3, rank=3),
        "step 3: rank 3: mlp.router in decoder layer 1 gave NaN",
    ),
    "infinity in logits, TP 2 with sequence parallel": (
        4,
        f"{EP2} --tensor-model-parallel-size 2 --sequence-parallel",
        BadLogits(1, 2, rank=2, value=INFINITY),
        "step 2: rank 2: mlp.router in decoder layer 1 gave NaN",
    ),
    "NaN in logits, full recompute": (
        2,
        f"{EP2} --recompute-granularity full --recompute-method uniform --recompute-num-layers 1",
        BadLogits(0, 2),
        "step 2: rank 0: mlp.router in decoder layer 0 gave NaN",
    ),
    "NaN in logits, bf16, allgather": (
        2,
        f"{EP2} --bf16 --moe-token-dispatcher-type allgather",
        BadLogits(0, 2),
        "step 2: rank 0: mlp.router in decoder layer 0 gave NaN",
    ),
    "NaN in a weight, overlapped parameter gathering": (
        4,
        f"{EP2} --use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather",
        BadExpert([1], 2, 3, "weight"),
        "linear_fc1_weight of expert 2 [0:48) in decoder layer 1 holds NaN",
    ),
    "NaN in logits, every step repeated for its statistics": (
        2,
        f"{EP2} --rerun-mode report_stats",
        BadLogits(0, 2),
        "step 2: rank 0: the router's logits in decoder layer 0 hold NaN",
    ),
    "NaN in logits, overlapped dispatch": (
        2,
        f"{EP2} --bf16 --moe-token-dispatcher-type alltoall --overlap-moe-expert-parallel-comm",
        BadLogits(0, 2),
        "step 2: rank 0: mlp.router in decoder layer 0 gave NaN",
    ),
    "NaN in a gradient, first step": (
        2,
        EP2,
        BadExpert([0], 0, 1, "gradient"),
        "step 1: rank 0: the gradient of linear_fc1_weight of expert 0 [0:16) in decoder layer 0 holds NaN",
    ),
}


@pytest.mark.parametrize(
    ("world", "flags", "fault", "cause"),
    [pytest.param(*case, id=name) for name, case in CASES.items()]
    + [pytest.param(*case, id=name, marks=pytest.mark.campaign) for name, case in CAMPAIGN.items()],
)
def test_what_is_not_finite_ends_every_rank_with_its_cause(tmp_path, request, told, world, flags, fault, cause):
    plan = save_plan(tmp_path / "plan.json", *[whole((0, 3), (1, 2))] * LAYERS) if EP2 in flags else "auto"
    ranks = train(world, f"{flags} --hmoe-placement {plan} --save {tmp_path / 'run'} --save-interval 1", fault)
    assert {rank.code for rank in ranks} == {STOPPED}
    assert len(errors(ranks)) == 1, errors(ranks)
    assert cause in errors(ranks)[0]
    saved = sorted(path.name for path in (tmp_path / "run").glob("iter_*"))
    assert saved == [f"iter_{step:07d}" for step in range(1, fault.step)]
    told(
        request.node.callspec.id,
        1,
        f"exit code {STOPPED} on all ranks; step, rank, layer and what it was are named; "
        "checkpoints of the steps before only",
    )


def tensors(run, step):
    """Every tensor of a checkpoint by its key."""
    from megatron.core.dist_checkpointing import load_plain_tensors

    state = load_plain_tensors(str(run / f"iter_{step:07d}"))
    return {key: value for key, value in state.items() if isinstance(value, torch.Tensor)}


def test_a_nan_locks_nobody_out(tmp_path, told):
    """Saved at step 2, NaN in step 4 at every try; then without the fault, and with its data left out."""
    run = tmp_path / "run"
    flags, resume = f"{EP2} --save {run} --save-interval 2", f"--load {run}"
    fault = BadLogits(1, 4)
    for start in ("", resume):  # on the same machine
        ranks = train(2, f"{flags} {start}", fault, count=6)
        assert [rank.code for rank in ranks] == [STOPPED] * 2
        assert errors(ranks)[0].startswith("error: step 4: rank 0: mlp.router in decoder layer 1")
        assert "--iterations-to-skip 4" in errors(ranks)[0]
        assert [path.name for path in run.glob("iter_*")] == ["iter_0000002"]
        assert (run / "latest_checkpointed_iteration.txt").read_text() == "2"
    assert all(value.isfinite().all() for value in run_ranks(1, tensors, run, 2)[0].values())
    ranks = train(2, f"{flags} {resume} --iterations-to-skip 4", fault, count=6)
    assert [(rank.code, rank.step) for rank in ranks] == [(0, 5)] * 2, "steps are counted from 0"
    assert not errors(ranks)
    assert (run / "latest_checkpointed_iteration.txt").read_text() == "6"
    told(
        "NaN in logits at every try, started again on the same machine",
        2,
        f"exit code {STOPPED}, the last good checkpoint each time; with its data left out it trained on",
    )


@pytest.mark.campaign
def test_stock_saves_the_step_and_locks_out(tmp_path):
    """What the guard is for: without it, the run ends with 16 and a checkpoint, and with 16 at the resume as well."""
    run = tmp_path / "run"
    flags = f"{EP2} --save {run} --save-interval 100"
    for start in ("", f"--load {run}"):
        ranks = train(2, f"{flags} {start}", StockMachine(BadLogits(1, 4)), count=6)
        assert [rank.code for rank in ranks] == [16, 16], ranks[0].output[-3000:]
        assert [path.name for path in run.glob("iter_*")] == ["iter_0000003"]


class StockMachine:
    """A fault, without the guard."""

    def __init__(self, fault):
        self.fault = fault

    def __call__(self):
        from hmoe_megatron.nan_guard import guard as numeric_guard

        numeric_guard.install = lambda stats: None
        self.fault()


@pytest.mark.campaign
@pytest.mark.parametrize("dispatcher", ["alltoall", "allgather"])
def test_all_tokens_on_one_expert_for_many_steps(tmp_path, told, dispatcher):
    """100 steps: every token of both ranks goes to expert 2, so rank 0, with experts 0 and 1, computes nothing."""
    count = 100
    plan = save_plan(tmp_path / "plan.json", *[whole((0, 1), (2, 3))] * LAYERS)
    flags = f"{MODEL} {TOPP} {EP2} --hmoe-placement {plan} --moe-token-dispatcher-type {dispatcher}"
    ranks = run_ranks(2, steps, flags, count, telemetry=True, force_expert=2, timeout_s=10 * TIMEOUT_S)
    assert ranks[0]["counts"].tolist() == [[0, 0, count * TOKENS, 0]] * LAYERS
    loss = losses(ranks)
    assert len(loss) == count and all(map(math.isfinite, loss))
    assert sum(loss[-10:]) < sum(loss[:10]), "it must learn"
    assert all(map(math.isfinite, ranks[0]["grad_norms"]))
    told(f"all tokens on one expert, a rank whose experts get none for 100 steps, {dispatcher}", 1, "it trains on")


@pytest.mark.parametrize(("count", "patience"), rarely((12, 8), (1100, 1000)))
def test_an_expert_without_tokens_is_warned_of_once_and_stays_in_the_checkpoint(tmp_path, told, count, patience):
    """Its gradient is zero in every step, so are its Adam moments; it moves to another plan like the others."""
    used, run = 2, tmp_path / "run"
    idle = [expert for expert in range(EXPERTS) if expert != used]
    ranks = run_ranks(
        2,
        pretrain,
        f"{MODEL} {TOPP} {EP2} --train-iters {count} --weight-decay 0 --log-interval 4 --save {run} "
        f"--save-interval {count} --hmoe-idle-expert-steps {patience}",
        OneExpert(used),
        timeout_s=10 * TIMEOUT_S,
    )
    assert [rank.code for rank in ranks] == [0, 0]
    warnings = [line for rank in ranks for line in rank.output.splitlines() if line.startswith("warning: step")]
    assert len(warnings) == 1, warnings
    assert warnings[0].startswith(f"warning: step {patience}: no token for {patience} steps: ")
    assert "layer 0 experts 0 1 3; layer 1 experts 0 1 3" in warnings[0]

    (saved,) = run_ranks(1, tensors, run, count)
    before = run_ranks(1, steps, f"{MODEL} {TOPP}", 0)[0]["experts"]
    for layer in range(LAYERS):
        for expert in range(EXPERTS):
            for matrix in ("fc1", "fc2"):
                key = f"decoder.layers.{layer}.mlp.experts.{expert}.linear_{matrix}.weight"
                moments = [saved[f"optimizer.state.{kind}.{key}"] for kind in ("exp_avg", "exp_avg_sq")]
                assert all(bool(moment.any()) == (expert == used) for moment in moments), key
                drawn = before[layer, expert, matrix, 0, WIDTHS[expert]]
                value = saved[key] if matrix == "fc1" else saved[key].t()
                assert torch.equal(value, drawn) == (expert in idle), key

    plan = save_plan(tmp_path / "cut.json", *[cut(((3, 0, 23), (0, 0, 16)), ((1, 0, 32), (2, 0, 48), (3, 23, 64)))] * 2)
    flags = f"{MODEL} {TOPP} {EP2} --hmoe-placement {plan} --load {run} --train-iters {count} --weight-decay 0"
    moved = run_ranks(2, steps, flags, 0)
    for (layer, expert, matrix, lo, hi), value in (item for rank in moved for item in rank["experts"].items()):
        whole_expert = saved[f"decoder.layers.{layer}.mlp.experts.{expert}.linear_{matrix}.weight"]
        expected = whole_expert[:, lo:hi] if matrix == "fc1" else whole_expert[:, lo:hi].t()
        assert torch.equal(value, expected), (layer, expert, matrix, lo, hi)
    assert math.isfinite(losses(run_ranks(2, steps, flags, 1))[0])
    told(
        f"experts without a token for {count} steps",
        len(idle) * LAYERS,
        "gradient zero in every step, one warning, saved, moved to another plan, trained on",
    )
