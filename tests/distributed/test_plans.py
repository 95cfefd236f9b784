"""Any plan trains the same model: whole experts anywhere, experts cut by width, ranks without experts."""

import pytest
import torch

from tests.distributed.plans import WIDTHS, cut, save_plan, whole
from tests.distributed.ranks import run_ranks
from tests.distributed.training_run import EXPERTS, LAYERS, ONE_ULP, SEQUENCE, UNCLIPPED, logical_state, losses, steps
from tests.rows import rarely

MODEL = f"--hmoe-widths {','.join(map(str, WIDTHS))}"
TOPP = "--hmoe-router topp --hmoe-top-p 0.6"
TOKENS = 8 * SEQUENCE  # of a global batch
# Whole experts at one expert-parallel size, Top-2: every plan is bitwise the same (docs/numerics.md).
# A cut splits a sum in two; another expert-parallel size and Top-P reorder sums. Seen over five steps: losses equal,
# now and then 1 ulp off; weights, which Adam moves by up to 1e-2 a step, 6e-5 off at most.
WEIGHT_BOUND = 2e-4
# With cuts every step is clipped by a norm that adds up pieces where the other adds up whole matrices: an ulp of that
# comes on top. Seen: 1.94e-7 of the loss in one of four cases (Top-P, allgather, step 3), at most 1 ulp in the others.
TWO_ULP = 2 * ONE_ULP


def run(tmp_path, ep, *plans, world=None, flags="", count=5, name="plan", **more):
    plan = save_plan(tmp_path / f"{name}.json", *(plans if len(plans) == LAYERS else plans * LAYERS))
    return run_ranks(
        world or ep,
        steps,
        f"{MODEL} --expert-model-parallel-size {ep} --hmoe-placement {plan} {flags}",
        count,
        telemetry=True,
        **more,
    )


def assert_same(state, expected, bound=0.0):
    assert state.keys() == expected.keys()
    worst = {name: (state[name] - expected[name]).abs().max().item() for name in state}
    assert max(worst.values()) <= bound, max(worst.items(), key=lambda item: item[1])


@pytest.mark.parametrize("dispatcher", ["alltoall", *rarely("allgather")])
def test_plans_of_whole_experts_are_bitwise_equal(tmp_path, dispatcher):
    flags = f"--moe-token-dispatcher-type {dispatcher}"
    plans = [
        (whole((0, 1), (2, 3)), whole((0, 1), (2, 3))),
        (whole((3, 0), (1, 2)), whole((2,), (0, 3, 1))),
        (whole((), (0, 1, 2, 3)), whole((0, 2, 3), (1,))),
    ]
    runs = [run(tmp_path, 2, *plan, flags=flags) for plan in plans]
    expected = logical_state(runs[0])
    for other in runs[1:]:
        assert losses(other) == losses(runs[0])
        assert_same(logical_state(other), expected)
        assert (other[0]["counts"] == runs[0][0]["counts"]).all(), "the router must not see the plan"
    assert runs[0][0]["tokens"].tolist() == [5 * TOKENS] * LAYERS
    assert runs[0][0]["counts"].sum() == 5 * TOKENS * 2 * LAYERS


@pytest.mark.parametrize("dispatcher", ["alltoall", *rarely("allgather")])
def test_a_rank_without_any_expert(tmp_path, dispatcher):
    flags = f"--moe-token-dispatcher-type {dispatcher}"
    both = run(tmp_path, 2, whole((0, 1), (2, 3)), flags=flags, name="both")
    one = run(tmp_path, 2, whole((), (0, 1, 2, 3)), flags=flags, name="one")
    assert losses(one) == losses(both)
    assert_same(logical_state(one), logical_state(both))


@pytest.mark.parametrize("ep", [4, *rarely(1, 2)])
@pytest.mark.parametrize("router", ["", TOPP])
def test_whole_experts_over_expert_parallel_sizes_of_one_world(tmp_path, ep, router):
    """World size 4: expert-parallel 1, 2 and 4 against expert-parallel 2 under another plan."""
    plans = {1: whole((0, 1, 2, 3)), 2: whole((1, 2), (3, 0)), 4: whole((2,), (), (0, 1), (3,))}
    flags = f"{UNCLIPPED} {router}"
    baseline = run(tmp_path, 2, whole((3,), (0, 1, 2)), world=4, flags=flags, name="baseline")
    other = run(tmp_path, ep, plans[ep], world=4, flags=flags)
    assert losses(other) == pytest.approx(losses(baseline), rel=ONE_ULP)
    assert_same(logical_state(other), logical_state(baseline), 0.0 if ep == 2 and not router else WEIGHT_BOUND)
    assert (other[0]["counts"][0] > 0).all()


@pytest.mark.parametrize("dispatcher", ["alltoall", *rarely("allgather")])
@pytest.mark.parametrize("router", ["", TOPP])
def test_experts_cut_by_width(tmp_path, router, dispatcher):
    flags = f"{router} --moe-token-dispatcher-type {dispatcher}"
    uncut = run(tmp_path, 2, whole((0, 1), (2, 3)), flags=flags, name="uncut")
    pieces = cut(((3, 0, 23), (0, 0, 16), (2, 0, 16)), ((1, 0, 32), (2, 16, 48), (3, 23, 64)))
    both = run(tmp_path, 2, pieces, flags=flags)
    assert losses(both) == pytest.approx(losses(uncut), rel=TWO_ULP)
    assert_same(logical_state(both), logical_state(uncut), WEIGHT_BOUND)


def test_initial_weights_do_not_depend_on_rank_or_plan(tmp_path):
    one = run(tmp_path, 1, whole((3, 1, 0, 2)), count=0, name="one")
    two = run(tmp_path, 2, cut(((3, 0, 23), (0, 0, 16)), ((1, 0, 32), (2, 0, 48), (3, 23, 64))), count=0, name="two")
    assert_same(logical_state(one), logical_state(two))
    other_seed = run(tmp_path, 1, whole((3, 1, 0, 2)), count=0, flags="--seed 4321", name="seed")
    state, changed = logical_state(one), logical_state(other_seed)
    experts = [name for name in state if name.startswith("expert.")]
    assert len(experts) == 2 * EXPERTS * LAYERS
    assert not any(torch.equal(state[name], changed[name]) for name in experts)
    assert len({state[name].flatten()[0].item() for name in experts}) == len(experts), "experts must differ"


@pytest.mark.parametrize("dispatcher", ["alltoall", *rarely("allgather")])
def test_all_tokens_on_one_expert(tmp_path, dispatcher):
    """Expert 2 gets every token, the other rank and all other experts none: their weights stay put, exactly."""
    flags = f"{TOPP} --weight-decay 0 --moe-token-dispatcher-type {dispatcher}"
    before = run(tmp_path, 2, whole((0, 1), (2, 3)), flags=flags, count=0, name="before")
    after = run(tmp_path, 2, whole((0, 1), (2, 3)), flags=flags, count=3, name="after", force_expert=2)
    assert after[0]["counts"].tolist() == [[0, 0, 3 * TOKENS, 0]] * LAYERS
    old, new = logical_state(before), logical_state(after)
    experts = {name: torch.equal(old[name], new[name]) for name in old if name.startswith("expert.")}
    assert {name for name, same in experts.items() if not same} == {
        f"expert.{layer}.2.{matrix}" for layer in range(LAYERS) for matrix in ("fc1", "fc2")
    }
