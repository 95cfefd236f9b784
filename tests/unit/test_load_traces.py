"""Traces: what holds of every workload, then the shape that each one is named for."""

import numpy as np
import pytest

from benchmarks.load_traces import PERIOD, TRACES, snapshot, trace

STEPS, EXPERTS, RANKS, TOKENS, TOPK = 60, 16, 4, 8192, 2
PER_RANK = EXPERTS // RANKS
HOT = EXPERTS // 4
every_workload = pytest.mark.parametrize("name", TRACES)
seeds = pytest.mark.parametrize("seed", range(3))


def made(name, seed=0, **options):
    return trace(name, STEPS, EXPERTS, RANKS, seed, TOKENS, TOPK, **options)


def hot_experts(tokens_E):
    """Those with over twice the mean: a hot expert gets 3.25 times as much, others a quarter of it."""
    return np.flatnonzero(tokens_E > 2 * TOKENS * TOPK / EXPERTS)


def ranks_of(experts):
    return set((experts // PER_RANK).tolist())


@seeds
@every_workload
def test_rows_of_each_step_are_counts_that_sum_to_the_choices_of_all_tokens(name, seed):
    tokens_TE = made(name, seed)
    assert tokens_TE.shape == (STEPS, EXPERTS) and np.issubdtype(tokens_TE.dtype, np.integer)
    assert tokens_TE.min() >= 0 and (tokens_TE.sum(axis=1) == TOKENS * TOPK).all()


@seeds
@every_workload
@pytest.mark.parametrize("experts, topk", [(4, 2), (8, 1), (16, 8)])
def test_no_expert_gets_more_rows_than_there_are_tokens(name, seed, experts, topk):
    """Also where all tokens choose among the hot experts alone, and the drawn rows are far from even."""
    tokens_TE = trace(name, STEPS, experts, 2, seed, 64, topk, heat=1.0, jitter=1.0)
    assert tokens_TE.max() <= 64 and (tokens_TE.sum(axis=1) == 64 * topk).all()


@every_workload
def test_a_seed_gives_one_trace_and_another_seed_another(name):
    assert (made(name, seed=5) == made(name, seed=5)).all()
    assert (made(name, seed=5) != made(name, seed=6)).any()


@seeds
def test_w0_is_balanced(seed):
    mean_E = made("W0", seed, jitter=0.0).mean(axis=0)
    # 60 steps of about 1024 rows of an expert: the mean is off by sqrt(1024 / 60) = 4 rows; 24 are six of these.
    np.testing.assert_allclose(mean_E, TOKENS * TOPK / EXPERTS, atol=24)


@seeds
@pytest.mark.parametrize("name", ["W1", "W2", "W3"])
def test_the_same_quarter_of_the_experts_is_hot_with_its_share_of_the_rows(name, seed):
    tokens_TE = made(name, seed, heat=0.75)
    hot = hot_experts(tokens_TE[0])
    assert hot.size == HOT and all((hot_experts(tokens_E) == hot).all() for tokens_E in tokens_TE)
    share = tokens_TE[:, hot].sum() / tokens_TE.sum()
    assert share == pytest.approx(0.75 + 0.25 * HOT / EXPERTS, abs=0.02)  # the jitter of 60 steps: 0.003


def test_w1_is_hot_anywhere():
    spread = [len(ranks_of(hot_experts(made("W1", seed)[0]))) for seed in range(20)]
    assert len(set(spread)) > 1


@seeds
def test_w2_is_hot_on_one_rank_and_w3_on_all_alike(seed):
    assert len(ranks_of(hot_experts(made("W2", seed)[0]))) == 1
    hot = hot_experts(made("W3", seed)[0])
    assert ranks_of(hot) == set(range(RANKS)) and set(np.diff(hot).tolist()) == {EXPERTS // HOT}


def test_w4_is_balanced_by_expert_but_noisier_than_w0():
    """By how much noisier is drawn: a factor of at least 1 that for 4 ranks is 1.3 in the mean."""
    ratios = [made("W4", seed).std(axis=0).mean() / made("W0", seed).std(axis=0).mean() for seed in range(20)]
    assert min(ratios) > 0.9 and np.mean(ratios) > 1.15
    # Jitter of at most 0.2 in a step, 0.026 in the mean of 60.
    np.testing.assert_allclose(made("W4").mean(axis=0), TOKENS * TOPK / EXPERTS, rtol=0.1)


@seeds
def test_w5_leaves_the_experts_of_half_of_the_ranks_without_rows(seed):
    tokens_TE = made("W5", seed)
    idle = np.flatnonzero(tokens_TE.sum(axis=0) == 0)
    assert idle.size == EXPERTS // 2 and len(ranks_of(idle)) == RANKS // 2
    assert (np.delete(tokens_TE, idle, axis=1) > 0).all()


@seeds
def test_w6_moves_on_to_the_next_rank_every_third_step(seed):
    at_T = [ranks_of(hot_experts(tokens_E)) for tokens_E in made("W6", seed)]
    assert PERIOD["W6"] == 3 and all(len(at) == 1 for at in at_T)
    rank_T = np.array([at.pop() for at in at_T])
    assert (rank_T == (rank_T[0] + np.arange(STEPS) // 3) % RANKS).all()


@seeds
def test_w7_is_hot_in_the_last_of_four_steps(seed):
    tokens_TE = made("W7", seed)
    burst_T = np.arange(STEPS) % 4 == 3
    assert PERIOD["W7"] == 4
    assert [hot_experts(tokens_E).size for tokens_E in tokens_TE] == np.where(burst_T, HOT, 0).tolist()
    bursts = {tuple(hot_experts(tokens_E).tolist()) for tokens_E in tokens_TE[burst_T]}
    assert len(bursts) == 1 and len(ranks_of(np.array(bursts.pop()))) == 1


def test_period_and_burst_can_be_chosen():
    rank_T = [ranks_of(hot_experts(tokens_E)).pop() for tokens_E in made("W6", period=7)]
    assert np.flatnonzero(np.diff(rank_T)).tolist() == list(range(6, STEPS - 1, 7))
    hot_T = [hot_experts(tokens_E).size > 0 for tokens_E in made("W7", period=5, burst=2)]
    assert hot_T == (np.arange(STEPS) % 5 >= 3).tolist()


@pytest.mark.parametrize("name", ["W2", "W5", "W6", "W7"])
def test_a_workload_lies_along_the_ranks_that_hold_the_experts(name):
    """Experts dealt to the ranks in turn: what is hot, or without rows, is again whole ranks."""
    tokens_E = trace(name, 4, EXPERTS, RANKS, 1, TOKENS, TOPK, rank_E=np.arange(EXPERTS) % RANKS)[-1]
    chosen = np.flatnonzero(tokens_E == 0) if name == "W5" else hot_experts(tokens_E)
    assert len(set((chosen % RANKS).tolist())) == chosen.size // PER_RANK


def test_a_snapshot_of_w7_is_in_the_burst():
    assert hot_experts(snapshot("W7", EXPERTS, RANKS, tokens=TOKENS)).size == HOT
    assert hot_experts(snapshot("W0", EXPERTS, RANKS, tokens=TOKENS)).size == 0


@pytest.mark.parametrize(
    "wrong, text",
    [
        ({"name": "W8"}, "give one of W0"),
        ({"steps": 0}, "0 steps"),
        ({"ranks": 0}, "0 ranks"),
        ({"tokens": 0}, "0 tokens"),
        ({"topk": 9}, "give at least twice top-k"),
        ({"heat": 1.5}, "heat 1.5"),
        ({"jitter": -0.1}, "jitter -0.1"),
        ({"name": "W6", "period": 0}, "period 0"),
        ({"name": "W7", "burst": 5}, "burst 5"),
        ({"rank_E": [0] * 15}, "rank_E"),
        ({"rank_E": [4] * 16}, "from 0 to 3"),
    ],
)
def test_what_is_out_of_range_is_named(wrong, text):
    arguments = {"name": "W0", "steps": 4, "experts": EXPERTS, "ranks": RANKS} | wrong
    with pytest.raises(ValueError, match=text):
        trace(**arguments)
