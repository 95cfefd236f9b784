"""Equal widths and the identity plan are Megatron's own MoE, bit by bit; the P-Penalty there is its load balance."""

import pytest
import torch

from tests.distributed.ranks import run_ranks
from tests.distributed.training_run import EQUAL, ONE_ULP, STOCK, UNCLIPPED, logical_state, losses, steps
from tests.rows import rarely

# Megatron and we form the same fp32 sums in another order; the loss passes five Adam steps.
AUX_LOSS_BOUND = 2e-5


@pytest.mark.parametrize(
    ("ep", "dispatcher"), [(2, "alltoall"), (2, "allgather"), *rarely((1, "alltoall"), (1, "allgather"))]
)
def test_five_steps_are_bitwise_megatrons(ep, dispatcher):
    layout = f"--expert-model-parallel-size {ep} --moe-token-dispatcher-type {dispatcher}"
    stock = run_ranks(ep, steps, f"{layout} {STOCK}", stock=True)
    expected = logical_state(stock)
    for backend in ("reference", "cpu"):
        ours = run_ranks(ep, steps, f"{layout} {EQUAL} --hmoe-p-penalty-coeff 0 --hmoe-gemm-backend {backend}")
        assert losses(ours) == losses(stock)
        assert ours[0]["grad_norms"] == stock[0]["grad_norms"]
        state = logical_state(ours)
        assert state.keys() == expected.keys()
        assert [name for name in state if not torch.equal(state[name], expected[name])] == []
    assert len(set(losses(stock))) == 5, "the steps must change something"


def test_without_expert_parallelism_megatrons_own_choice_of_optimizer_differs_in_the_norm_only():
    """At EP 1 Megatron keeps experts in the optimizer of the dense weights, we in their own as at EP 2, so that a
    checkpoint loads in either. The norm is then a root of two sums instead of one: 1 ulp. No step is clipped here."""
    stock = run_ranks(1, steps, f"{STOCK} {UNCLIPPED}", stock=True, own_optimizer=False)
    ours = run_ranks(1, steps, f"{EQUAL} --hmoe-p-penalty-coeff 0 {UNCLIPPED}")
    assert losses(ours) == losses(stock)
    assert ours[0]["grad_norms"] == pytest.approx(stock[0]["grad_norms"], rel=ONE_ULP)
    state, expected = logical_state(ours), logical_state(stock)
    assert [name for name in expected if not torch.equal(state[name], expected[name])] == []


@pytest.mark.parametrize(
    "scaling",
    [
        "--tensor-model-parallel-size 2 --sequence-parallel --expert-tensor-parallel-size 1",
        *rarely("", "--calculate-per-token-loss"),
    ],
)
@pytest.mark.parametrize("loss", ["p-penalty", *rarely("load-balance")])
def test_p_penalty_at_equal_widths_is_k_times_megatrons_load_balance(loss, scaling):
    """Also in its scaling by micro-batches, tokens, and tensor-parallel ranks that share a sequence."""
    layout = f"--expert-model-parallel-size 2 {scaling}"
    stock = run_ranks(
        2, steps, f"{layout} {STOCK} --moe-router-load-balancing-type aux_loss --moe-aux-loss-coeff 1.0", stock=True
    )
    without = run_ranks(2, steps, f"{layout} {STOCK}", stock=True)
    other = {"p-penalty": "", "load-balance": "--hmoe-p-penalty-coeff 0"}[loss]
    ours = run_ranks(2, steps, f"{layout} {EQUAL} {other} --hmoe-{loss}-coeff 0.5")  # K = 2
    assert losses(ours) == pytest.approx(losses(stock), rel=AUX_LOSS_BOUND)
    assert losses(without) != pytest.approx(losses(stock), rel=10 * AUX_LOSS_BOUND), "the loss must matter here"


@pytest.mark.parametrize(
    "feature",
    [
        "--moe-shared-expert-intermediate-size 24 --moe-shared-expert-overlap --moe-token-dispatcher-type alltoall",
        "--moe-z-loss-coeff 1e-2",
        "--moe-apply-probs-on-input --moe-router-topk 1 --moe-router-pre-softmax",
        "--moe-router-score-function sigmoid --moe-router-enable-expert-bias --moe-router-load-balancing-type none",
        *rarely(
            "--calculate-per-token-loss",
            "--moe-router-dtype fp32",
            "--moe-shared-expert-intermediate-size 24",
            "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1",
            "--recompute-granularity selective --recompute-modules moe",
        ),
    ],
)
def test_features_of_megatrons_moe_keep_working(feature):
    layout = f"--expert-model-parallel-size 2 {feature}"
    stock = run_ranks(2, steps, f"{layout} {STOCK}", stock=True)
    ours = run_ranks(2, steps, f"{layout} {EQUAL} --hmoe-p-penalty-coeff 0")
    assert losses(ours) == losses(stock)
    state, expected = logical_state(ours), logical_state(stock)
    assert [name for name in expected if not torch.equal(state[name], expected[name])] == []


@pytest.mark.parametrize(
    "recompute",
    [
        "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1",
        "--recompute-granularity selective --recompute-modules moe",
    ],
)
def test_recompute_counts_tokens_and_losses_once(recompute):
    flags = "--expert-model-parallel-size 2 --hmoe-widths 16,32,48,64 --hmoe-router topp --hmoe-top-p 0.6"
    plain, recomputed = (run_ranks(2, steps, f"{flags} {more}", telemetry=True) for more in ("", recompute))
    assert losses(recomputed) == losses(plain)
    for key in ("counts", "tokens"):
        assert (recomputed[0][key] == plain[0][key]).all()
