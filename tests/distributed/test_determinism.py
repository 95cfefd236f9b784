"""What is promised bitwise (docs/numerics.md): resume with dropout and jitter on, and any plan of whole experts."""

import contextlib
import io
import random

import numpy
import pytest
import torch

from tests.distributed.plans import cut, save_plan, whole
from tests.distributed.ranks import run_ranks
from tests.distributed.test_plans import MODEL, TOPP
from tests.distributed.training_run import EXPERTS, LAYERS, ONE_ULP, UNCLIPPED, logical_state, losses, steps
from tests.rows import rarely

NOISE = "--hidden-dropout 0.1 --attention-dropout 0.1 --moe-input-jitter-eps 0.01"
ALLTOALL = "--moe-token-dispatcher-type alltoall"
ORDERED = f"{ALLTOALL} --deterministic-mode"
ROUTERS = {"Top-2": "", "Top-3": f"--moe-router-topk 3 {ORDERED}", "Top-P": f"{TOPP} {ORDERED}"}
CLIP = 1.0  # of TINY


def steps_and_streams(flags, count, repaired=True, **more):
    """`steps`, and also: streams {name: state} of this rank's generators at the end, said: lines about them.

    repaired: False leaves generators in checkpoints as Megatron has them.
    """
    from hmoe_megatron.patches import registry

    if not repaired:
        registry.DONE["rng_of_ranks"] = False
    with contextlib.redirect_stdout(io.StringIO()) as said:
        result = steps(flags, count, **more)
    result["said"] = [line for line in said.getvalue().splitlines() if "random number" in line]
    return result | {"streams": streams()}


def streams():
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    tracked = {name: state.numpy().tobytes() for name, state in get_cuda_rng_tracker().get_states().items()}
    default = {"python": repr(random.getstate()), "numpy": repr(numpy.random.get_state(legacy=True)[1].tolist())}
    return tracked | default | {"torch": torch.get_rng_state().numpy().tobytes()}


def differences(one, other):
    """Names of what differs between the ends of two runs, bit by bit: weights by logical name, streams by rank."""
    first, second = logical_state(one), logical_state(other)
    assert first.keys() == second.keys()
    names = [name for name in first if not torch.equal(first[name], second[name])]
    for rank, (mine, theirs) in enumerate(zip(one, other, strict=True)):
        streams = mine["streams"].items()
        names += [f"{name} of rank {rank}" for name, state in streams if state != theirs["streams"][name]]
    return names


def assert_bitwise(run, expected, first=0):
    """`run` is the last steps of `expected`, from step `first` on."""
    assert losses(run) == losses(expected)[first:]
    assert run[0]["grad_norms"] == expected[0]["grad_norms"][first:]
    assert differences(run, expected) == []


def random_plan(seed, ranks, idle=True):
    """Pieces by layer: every expert whole on a random rank, in random order; `idle`: a rank may have none."""
    draw, layers = random.Random(seed), []
    while len(layers) < LAYERS:
        plan = [[] for _ in range(ranks)]
        for expert in draw.sample(range(EXPERTS), EXPERTS):
            plan[draw.randrange(ranks)].append(expert)
        if idle or all(plan):
            layers.append(whole(*plan))
    return layers


def in_order(ranks):
    return [whole(*(range(r * EXPERTS // ranks, (r + 1) * EXPERTS // ranks) for r in range(ranks)))] * LAYERS


def run(folder, ep, pieces, flags="", count=4, world=None, **more):
    plan = save_plan(folder / "plan.json", *pieces)
    given = f"{MODEL} --expert-model-parallel-size {ep} --hmoe-placement {plan} {flags}"
    return run_ranks(world or ep, steps_and_streams, given, count, timeout_s=180.0, **more)


def broken_run(folder, ep, before, after, flags, world=None, repaired=(True, True)):
    """[two steps under plan `before`, saved], [two more, loaded under plan `after`]."""
    saving, loading = (f"{flags} --{what} {folder / 'checkpoint'}" for what in ("save", "load"))
    first = run(folder, ep, before, f"{saving} --save-interval 1000", 2, world, save=True, repaired=repaired[0])
    second = run(folder, ep, after, loading, 2, world, skip=2, repaired=repaired[1])
    return first, second


def seeds(few, many):
    """`few` seeds in the suite, `many` in the campaign."""
    return [pytest.param(seed, marks=[pytest.mark.campaign] if seed >= few else []) for seed in range(many)]


# --- resume


def test_dropout_and_jitter_draw_random_numbers(tmp_path):
    alone = ["", "--hidden-dropout 0.1", "--attention-dropout 0.1", "--moe-input-jitter-eps 0.01"]
    runs = [run(tmp_path, 1, in_order(1), flag, 1) for flag in alone]
    assert len({losses(r)[0] for r in runs}) == len(alone)


@pytest.mark.parametrize("seed", seeds(1, 20))
@pytest.mark.parametrize("ep", [2, *rarely(1, 4)])
def test_a_resumed_run_is_the_unbroken_one(tmp_path, ep, seed):
    """Its first half is also the same run twice."""
    flags, plan = f"{NOISE} --seed {100 * ep + seed}", random_plan(seed, ep)
    unbroken = run(tmp_path, ep, plan, flags)
    first, second = broken_run(tmp_path, ep, plan, plan, flags)
    assert losses(first) == losses(unbroken)[:2]
    assert first[0]["grad_norms"] == unbroken[0]["grad_norms"][:2]
    assert first[0]["streams"] != second[0]["streams"]
    assert_bitwise(second, unbroken, first=2)
    assert second[0]["said"] == []


@pytest.mark.parametrize("ep", [2, *rarely(4)])
def test_stock_gives_all_expert_parallel_ranks_the_streams_of_the_first(tmp_path, ep):
    unbroken = run(tmp_path, ep, in_order(ep), NOISE)
    _, second = broken_run(tmp_path, ep, in_order(ep), in_order(ep), NOISE, repaired=(False, False))
    own = [rank["streams"]["expert-parallel-rng"] for rank in unbroken]
    assert len(set(own)) == ep
    assert [rank["streams"]["expert-parallel-rng"] for rank in second] == own[:1] * ep


@pytest.mark.parametrize(("ep", "world"), [(1, 1), *rarely((2, 4))])
def test_under_another_layout_streams_are_those_of_a_fresh_run(tmp_path, ep, world):
    run(tmp_path, 2, in_order(2), f"{NOISE} --save {tmp_path / 'checkpoint'} --save-interval 1000", 2, save=True)
    fresh = run(tmp_path, ep, in_order(ep), NOISE, 0, world)
    loaded = run(tmp_path, ep, in_order(ep), f"{NOISE} --load {tmp_path / 'checkpoint'}", 0, world)
    assert [rank["streams"] for rank in loaded] == [rank["streams"] for rank in fresh]
    assert len({rank["streams"]["expert-parallel-rng"] for rank in loaded}) == ep
    (line,) = loaded[0]["said"]
    assert line.startswith(" random number generators are not loaded, and start as a fresh run's with --seed 1234: ")
    assert f"world_size 2 there, {world} here" in line


def test_a_checkpoint_with_streams_of_one_rank_only(tmp_path):
    """As Megatron saves them."""
    fresh = run(tmp_path, 2, in_order(2), NOISE, 0)
    _, second = broken_run(tmp_path, 2, in_order(2), in_order(2), NOISE, repaired=(False, True))
    (line,) = second[0]["said"]
    assert line.endswith("the checkpoint has those of data-parallel rank 0 only")
    assert [r["streams"]["expert-parallel-rng"] for r in second] == [r["streams"]["expert-parallel-rng"] for r in fresh]


# --- plans of whole experts

# (router, expert-parallel size, ranks, clipped): in the suite one plan of each of these, in the campaign ten of all.
SUITE = {("Top-P", 4, 4, True)}
CASES = [
    pytest.param(*case, seed, marks=[] if seed == 0 and case in SUITE else [pytest.mark.campaign])
    for case in (
        (router, *size, clipped) for router in ROUTERS for size in ((2, 2), (2, 4), (4, 4)) for clipped in (True, False)
    )
    for seed in range(10)
]


@pytest.mark.parametrize(("router", "ep", "world", "clipped", "seed"), CASES)
def test_any_plan(tmp_path, router, ep, world, clipped, seed):
    flags = f"{ROUTERS[router]} {'' if clipped else UNCLIPPED}"
    expected = run(tmp_path, ep, in_order(ep), flags, world=world)
    assert max(expected[0]["grad_norms"]) > CLIP, "the clipped runs must be clipped"
    assert_bitwise(run(tmp_path, ep, random_plan(1000 * ep + seed, ep), flags, world=world), expected)


@pytest.mark.parametrize("seed", seeds(1, 10))
@pytest.mark.parametrize(("router", "ep"), rarely(("Top-P", 2), ("Top-3", 4)))
def test_another_plan_in_the_middle_of_a_run(tmp_path, router, ep, seed):
    """With dropout and jitter on: a rank's streams do not depend on its experts."""
    flags = f"{ROUTERS[router]} {NOISE}"
    unbroken = run(tmp_path, ep, in_order(ep), flags, world=4)
    _, second = broken_run(tmp_path, ep, random_plan(seed, ep), random_plan(50 + seed, ep), flags, world=4)
    assert_bitwise(second, unbroken, first=2)


LAYOUTS = {
    "pipeline": (2, 4, "--pipeline-model-parallel-size 2"),
    "expert tensor": (2, 4, f"--tensor-model-parallel-size 2 --sequence-parallel {ALLTOALL}"),
    "tensor, whole experts": (
        2,
        2,
        f"--tensor-model-parallel-size 2 --sequence-parallel --expert-tensor-parallel-size 1 {ALLTOALL}",
    ),
    "bf16": (2, 2, f"--bf16 {ROUTERS['Top-3']}"),
    "allgather, Top-2": (4, 4, "--moe-token-dispatcher-type allgather"),
    "distributed optimizer": (2, 4, f"--use-distributed-optimizer {ROUTERS['Top-3']}"),
    "distributed optimizer, bf16": (2, 4, "--use-distributed-optimizer --bf16"),
}
LAYOUTS_OF_THE_SUITE = ("pipeline",)


@pytest.mark.parametrize(
    ("layout", "seed"),
    [
        pytest.param(layout, seed, marks=[] if seed == 0 and layout in LAYOUTS_OF_THE_SUITE else [pytest.mark.campaign])
        for layout in LAYOUTS
        for seed in range(5)
    ],
)
def test_any_plan_under(tmp_path, layout, seed):
    ep, world, flags = LAYOUTS[layout]
    idle = "distributed" not in layout  # its ranks must hold experts
    expected = run(tmp_path, ep, in_order(ep), flags, world=world)
    assert max(expected[0]["grad_norms"]) > CLIP
    assert_bitwise(run(tmp_path, ep, random_plan(70 + seed, ep, idle), flags, world=world), expected)


def test_the_norm_with_cut_experts_is_that_of_whole_ones(tmp_path):
    """Of the first step, where only the order of sums differs."""
    pieces = [cut(((3, 0, 23), (0, 0, 16), (2, 0, 16)), ((1, 0, 32), (2, 16, 48), (3, 23, 64)))] * LAYERS
    norms = [run(tmp_path, 2, plan, count=1)[0]["grad_norms"][0] for plan in (in_order(2), pieces)]
    assert norms[1] == pytest.approx(norms[0], rel=2 * ONE_ULP)
