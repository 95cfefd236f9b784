"""What only a GPU runs, with stand-ins for its kernels: the same losses as without it. tests/gpu has the kernels."""

import pytest

from tests.distributed.layouts import LOSS_BOUND, NORM_BOUND, WEIGHT_BOUND
from tests.distributed.plans import cut, save_plan, whole
from tests.distributed.ranks import run_ranks
from tests.distributed.standins import steps_with_standins
from tests.distributed.test_layouts import CUTS, MODEL, apart_of, weights_apart
from tests.distributed.training_run import losses
from tests.rows import rarely

TOPP = "--hmoe-router topp --hmoe-top-p 0.6"
ALLTOALL = "--moe-token-dispatcher-type alltoall"
EP2 = "--expert-model-parallel-size 2"
ETP2 = "--tensor-model-parallel-size 2 --sequence-parallel --expert-tensor-parallel-size 2"


def run(tmp_path, ranks, plans, flags):
    plan = save_plan(tmp_path / "plan.json", *plans)
    return run_ranks(
        ranks, steps_with_standins, f"{MODEL} {flags} --hmoe-placement {plan}", same_dense=True, telemetry=True
    )


def assert_agree(found, expected):
    assert apart_of(losses(found), losses(expected)) <= LOSS_BOUND
    assert apart_of(found[0]["grad_norms"], expected[0]["grad_norms"]) <= NORM_BOUND
    assert weights_apart(found, expected[0]) <= WEIGHT_BOUND
    for rank in found:
        assert (rank["counts"] == expected[0]["counts"]).all() and (rank["tokens"] == expected[0]["tokens"]).all()


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory):
    found = {}

    def of(router):
        if router not in found:
            found[router] = run(tmp_path_factory.mktemp("one"), 1, [CUTS[1]] * 2, router)
        return found[router]

    return of


@pytest.mark.parametrize(
    ("ranks", "router", "flags"), [(4, TOPP, f"{EP2} {ETP2}"), *rarely((2, TOPP, EP2), (2, "", EP2))]
)
@pytest.mark.parametrize("backend", ["deepep", "hybridep"])
def test_flex_dispatch_of_cut_experts(tmp_path, one_rank, ranks, router, flags, backend):
    """Three slots a rank in the first layer, the second has fewer pieces on each rank and an empty slot."""
    uneven = cut(((0, 0, 16),), ((1, 0, 32), (2, 0, 48))), whole((3,), ())
    plans = [CUTS[2], tuple(a + b for a, b in zip(*uneven, strict=True))]
    flags = f"{flags} {router} --moe-token-dispatcher-type flex --moe-flex-dispatcher-backend {backend}"
    found = run(tmp_path, ranks, plans, flags)
    assert_agree(found, one_rank(router))
    assert found[0]["hybridep_slots"] == ([3] if backend == "hybridep" else [])


@pytest.mark.parametrize("flags", [f"{TOPP} {EP2} {ALLTOALL}", "--calculate-per-token-loss", *rarely("")])
def test_context_parallel(tmp_path, one_rank, flags):
    """Batches are sliced, and the router's losses and counts are those of the whole sequence."""
    plan = CUTS[2] if EP2 in flags else CUTS[1]
    model = " ".join(part for part in (TOPP, "--calculate-per-token-loss") if part in flags)
    assert_agree(run(tmp_path, 2, [plan] * 2, f"{flags} --context-parallel-size 2"), one_rank(model))
