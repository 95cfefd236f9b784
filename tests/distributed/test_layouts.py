"""Every row of the table of parallel layouts, and the page that shows it. `make layouts` runs them all."""

import functools
from pathlib import Path

import pytest
import torch

from tests.distributed.layouts import (
    AGAINST_ONE_RANK,
    AGAINST_STOCK,
    BF16_LOSS_BOUND,
    BF16_NORM_BOUND,
    LOSS_BOUND,
    MODEL_WORDS,
    NORM_BOUND,
    WEIGHT_BOUND,
    WORDS,
    parallelism_document,
)
from tests.distributed.plans import WIDTHS, cut, save_plan, whole
from tests.distributed.ranks import run_ranks
from tests.distributed.training_run import EQUAL, ONE_ULP, STOCK, UNCLIPPED, logical_state, losses, steps

NO_LOSS = f"{EQUAL} --hmoe-p-penalty-coeff 0"
MODEL = f"--hmoe-widths {','.join(map(str, WIDTHS))} --make-vocab-size-divisible-by 1"
# By expert-parallel size; multiples of 16, so that expert tensor parallelism may halve a piece.
CUTS = {
    1: whole((2, 0, 1, 3)),
    2: cut(((3, 0, 32), (0, 0, 16), (2, 0, 16)), ((1, 0, 32), (2, 16, 48), (3, 32, 64))),
    4: cut(((3, 0, 48),), ((3, 48, 64), (2, 0, 32)), ((2, 32, 48), (1, 0, 32)), ((0, 0, 16),)),
    8: cut(
        ((0, 0, 16),),
        ((1, 0, 16),),
        ((1, 16, 32),),
        ((2, 0, 16),),
        ((2, 16, 32),),
        ((2, 32, 48),),
        ((3, 0, 32),),
        ((3, 32, 64),),
    ),
}
EIGHT_RANKS_TIMEOUT_S = 300  # on two shared cores


def rows(layouts):
    return [pytest.param(row, id=str(row), marks=[] if row.suite else [pytest.mark.campaign]) for row in layouts]


@pytest.mark.parametrize("layout", rows(AGAINST_STOCK))
def test_equal_widths_are_bitwise_megatrons(layout):
    run = functools.partial(run_ranks, layout.ranks, steps, timeout_s=EIGHT_RANKS_TIMEOUT_S)
    flags = f"{layout.flags} {UNCLIPPED if layout.cuts_elsewhere else ''}"
    stock = run(f"{flags} {STOCK}", stock=True)
    ours = run(f"{flags} {NO_LOSS} --hmoe-gemm-backend reference")
    assert losses(ours) == losses(stock)
    assert len(set(losses(stock))) == 5
    for own, theirs in zip(ours, stock, strict=True):
        bound = ONE_ULP if layout.cuts_elsewhere else 0
        assert own["grad_norms"] == pytest.approx(theirs["grad_norms"], rel=bound, abs=0)
        for kind in ("dense", "experts"):
            assert own[kind].keys() == theirs[kind].keys()
            assert [key for key, value in own[kind].items() if not torch.equal(value, theirs[kind][key])] == []


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory):
    """(flags) -> result of the model on one rank with whole experts, run once."""
    return functools.cache(lambda flags, layers: train(tmp_path_factory.mktemp("one"), 1, 1, layers, flags)[0])


def train(tmp_path, ranks, expert_parallel, layers, flags):
    plan = save_plan(tmp_path / "plan.json", *[CUTS[expert_parallel]] * layers)
    return run_ranks(
        ranks,
        steps,
        f"{MODEL} {flags} --hmoe-placement {plan}",
        same_dense=True,
        telemetry=True,
        timeout_s=EIGHT_RANKS_TIMEOUT_S,
    )


@pytest.mark.parametrize("layout", rows(AGAINST_ONE_RANK))
def test_unequal_widths_agree_with_one_rank(tmp_path, one_rank, layout):
    one = one_rank(layout.model_flags, layout.num_layers)
    many = train(tmp_path, layout.ranks, layout.expert_parallel, layout.num_layers, layout.flags)
    apart = {
        "loss": apart_of(losses(many), losses([one])),
        "norm": max(apart_of(rank["grad_norms"], one["grad_norms"]) for rank in many),
        "weights": weights_apart(many, one),
    }
    print(layout, {name: f"{value:.1e}" for name, value in apart.items()})
    assert apart["loss"] <= (BF16_LOSS_BOUND if layout.bf16 else LOSS_BOUND)
    assert apart["norm"] <= (BF16_NORM_BOUND if layout.bf16 else NORM_BOUND)
    assert len(set(losses(many))) == 5
    if not layout.bf16:  # where rounding moves tokens to other experts
        assert apart["weights"] <= WEIGHT_BOUND
        for rank in many:  # the layers of all pipeline stages, on every rank
            assert (rank["counts"] == one["counts"]).all() and (rank["tokens"] == one["tokens"]).all()


def apart_of(found, expected):
    return max(abs(a - b) / abs(b) for a, b in zip(found, expected, strict=True))


def weights_apart(many, one):
    """Largest difference of an expert's weight; replicas must be equal."""
    state, expected = (logical_state([rank | {"dense": {}} for rank in ranks]) for ranks in (many, [one]))
    assert state.keys() == expected.keys()
    return max((state[name] - expected[name]).abs().max().item() for name in state)


def test_bf16_on_the_cpu_backend_agrees_as_far_as_bf16_goes():
    flags = f"--expert-model-parallel-size 2 --bf16 {NO_LOSS}"
    reference = run_ranks(2, steps, f"{flags} --hmoe-gemm-backend reference")
    cpu = run_ranks(2, steps, f"{flags} --hmoe-gemm-backend cpu")
    assert losses(cpu) == pytest.approx(losses(reference), rel=BF16_LOSS_BOUND)


def test_every_word_is_in_a_row():
    used = {word for layout in (*AGAINST_STOCK, *AGAINST_ONE_RANK) for word in layout.words.split()}
    assert used == WORDS.keys() | MODEL_WORDS.keys()
    assert max(layout.ranks for layout in AGAINST_ONE_RANK) == 8


def test_the_page_is_up_to_date():
    assert (Path(__file__).parents[2] / "docs" / "parallelism.md").read_text() == parallelism_document()
