"""The numbers of the routing report: by hand, against scipy, and what must hold whatever the routing is."""

import numpy as np
import pytest
from scipy.special import rel_entr
from scipy.stats import wasserstein_distance

from hmoe_megatron.tools.report import statistics
from hmoe_megatron.tools.report.statistics import Model, Routing

TOKENS, LAYERS, EXPERTS, VOCABULARY = 400, 3, 5, 40
MODEL = Model(np.array([0, 1, 3]), np.array([[30, 10, 50, 20, 40]] * LAYERS), hidden_size=8)


def random_routing(seed=0, windows=7):
    """A token has one expert at least, more likely the wide ones."""
    random = np.random.default_rng(seed)
    logits_TLE = random.normal(size=(TOKENS, LAYERS, EXPERTS))
    log_probs_TLE = logits_TLE - np.log(np.exp(logits_TLE).sum(-1, keepdims=True))
    loss_T = random.exponential(2.0, TOKENS).astype(np.float32)
    window_T = np.sort(np.arange(TOKENS) % windows)
    loss_T[np.flatnonzero(np.diff(window_T, prepend=-1))] = np.nan
    return Routing(
        token_T=random.zipf(1.5, TOKENS) % VOCABULARY,
        window_T=window_T,
        loss_T=loss_T,
        chosen_TLE=logits_TLE >= np.minimum(logits_TLE.max(-1, keepdims=True), 0.5),
        log_probs_TLE=log_probs_TLE.astype(np.float32),
    )


@pytest.fixture(params=range(3))
def routing(request):
    return random_routing(request.param)


def counts(routing, row=0):
    return statistics.token_counts(routing.token_T, routing.chosen_TLE[:, row])


def test_experts_are_ordered_from_narrow_to_wide():
    assert MODEL.expert_E.tolist() == [1, 3, 0, 4, 2]


def test_activated_ratio_and_parameters_by_hand():
    chosen_TLE = np.array([[[1, 0], [1, 1]], [[1, 1], [0, 1]], [[0, 1], [0, 1]], [[1, 0], [0, 1]]], bool)
    ratio_LE = chosen_TLE.mean(0)
    assert ratio_LE.tolist() == [[0.75, 0.5], [0.25, 1]]
    model = Model(np.array([0, 1]), np.array([[4, 8], [2, 10]]), hidden_size=16)
    # layer 0: 3 x 16 x (0.75 x 4 + 0.5 x 8)
    assert statistics.activated_parameters(ratio_LE, model).tolist() == [336, 504]


def test_all_experts_on_activate_all_parameters():
    ratio_LE = np.ones((LAYERS, EXPERTS))
    np.testing.assert_array_equal(
        statistics.activated_parameters(ratio_LE, MODEL), 3 * MODEL.hidden_size * MODEL.width_LE.sum(1)
    )


def test_token_counts_by_hand():
    chosen_TE = np.array([[1, 0], [1, 1], [0, 1], [1, 0]], bool)
    ids_U, total_U, counts_EU = statistics.token_counts(np.array([7, 3, 7, 7]), chosen_TE)
    assert ids_U.tolist() == [3, 7] and total_U.tolist() == [1, 3]
    assert counts_EU.tolist() == [[1, 2], [1, 1]]


def test_every_routed_token_is_counted_once(routing):
    for row in range(LAYERS):
        ids_U, total_U, counts_EU = counts(routing, row)
        assert total_U.sum() == TOKENS and (counts_EU <= total_U).all()
        np.testing.assert_array_equal(counts_EU.sum(1), routing.chosen_TLE[:, row].sum(0))
        np.testing.assert_array_equal(ids_U, np.unique(routing.token_T))


def test_similarity_by_hand():
    """Shares of the text 1/2, 1/4, 1/4, so the tokens lie at 1/4, 5/8, 7/8."""
    counts_EU = np.array([[2, 0, 0], [0, 0, 1], [1, 1, 0], [0, 0, 0]])
    distance_EE = statistics.similarity(counts_EU, np.array([2, 1, 1]))
    np.testing.assert_allclose(distance_EE[0, :3], [0, 5 / 8, 3 / 16], atol=1e-15)
    assert distance_EE[1, 2] == 7 / 8 - (1 / 4 + 5 / 8) / 2
    assert np.isnan(distance_EE[3]).all() and np.isnan(distance_EE[:, 3]).all()


def test_similarity_is_scipys_wasserstein_distance(routing):
    _, total_U, counts_EU = counts(routing)
    order_U = np.argsort(-total_U, kind="stable")
    share_U = total_U[order_U] / TOKENS
    position_U, counts_EU_sorted = np.cumsum(share_U) - share_U / 2, counts_EU[:, order_U]
    expected = [
        [wasserstein_distance(position_U, position_U, a_U, b_U) for b_U in counts_EU_sorted] for a_U in counts_EU_sorted
    ]
    np.testing.assert_allclose(statistics.similarity(counts_EU, total_U), expected, rtol=1e-12, atol=1e-14)


def test_similarity_is_a_distance(routing):
    _, total_U, counts_EU = counts(routing)
    distance_EE = statistics.similarity(counts_EU, total_U)
    np.testing.assert_allclose(distance_EE, distance_EE.T, atol=1e-14)
    assert (np.diag(distance_EE) == 0).all() and (distance_EE < 1).all()
    assert (distance_EE[:, None, :] <= distance_EE[:, :, None] + distance_EE[None] + 1e-12).all()
    np.testing.assert_allclose(statistics.similarity(3 * counts_EU, total_U), distance_EE, atol=1e-14)


def test_synergy_by_hand():
    """Expert 0 lies on the tokens as 3/4, 1/4; expert 1 as 1/4, 3/4."""
    log_probs_TE = np.log([[0.75, 0.25], [0.25, 0.75]])
    divergence = 0.75 * np.log(3) + 0.25 * np.log(1 / 3)
    np.testing.assert_allclose(statistics.synergy(log_probs_TE), [[0, divergence], [divergence, 0]], atol=1e-15)


def test_synergy_is_scipys_divergence_of_the_experts_weights(routing):
    probs_TE = np.exp(routing.log_probs_TLE[:, 1].astype(float))
    weights_ET = (probs_TE / probs_TE.sum(0)).T
    expected = [[rel_entr(a_T, b_T).sum() for b_T in weights_ET] for a_T in weights_ET]
    found_EE = statistics.synergy(routing.log_probs_TLE[:, 1])
    np.testing.assert_allclose(found_EE, expected, rtol=1e-9, atol=1e-12)
    assert (found_EE >= 0).all() and (np.diag(found_EE) < 1e-12).all()


def test_experts_that_want_the_same_tokens_have_no_divergence():
    """Also where one is wanted far more than the other."""
    log_probs_TE = np.log([[0.6, 0.06, 0.34], [0.3, 0.03, 0.67], [0.1, 0.01, 0.89]])
    found_EE = statistics.synergy(log_probs_TE)
    assert found_EE[0, 1] < 1e-12 and found_EE[1, 0] < 1e-12 and found_EE[0, 2] > 0.1


def test_synergy_stays_finite_for_weights_near_zero():
    found_EE = statistics.synergy(np.array([[-90.0, 0.0], [-100.0, 0.0]], np.float32))
    assert np.isfinite(found_EE).all() and found_EE[0, 1] > 0.6


def test_shares_by_difficulty_by_hand():
    """Losses 1, 2 | 3, 4; the token without a loss, which all experts get, is left out."""
    loss_T = np.array([3, 1, np.nan, 4, 2], np.float32)
    chosen_TLE = np.array([[[0, 1]], [[1, 0]], [[1, 1]], [[1, 1]], [[1, 0]]], bool)
    share_DE, loss_D = statistics.shares_by_difficulty(chosen_TLE, loss_T, parts=2)
    np.testing.assert_allclose(share_DE, [[1, 0], [1 / 3, 2 / 3]])
    assert loss_D.tolist() == [1.5, 3.5]


def test_shares_by_difficulty_are_shares(routing):
    share_DE, loss_D = statistics.shares_by_difficulty(routing.chosen_TLE, routing.loss_T)
    np.testing.assert_allclose(share_DE.sum(1), 1)
    assert share_DE.shape == (10, EXPERTS) and (np.diff(loss_D) >= 0).all()
    one_DE, _ = statistics.shares_by_difficulty(routing.chosen_TLE, routing.loss_T, parts=1)
    known = routing.chosen_TLE[np.isfinite(routing.loss_T)].sum(0)
    np.testing.assert_allclose(one_DE[0], (known / known.sum(1, keepdims=True)).mean(0))
    with pytest.raises(ValueError, match="9 tokens with a loss are too few for 10 parts"):
        statistics.shares_by_difficulty(routing.chosen_TLE[:9], np.ones(9))


def test_top_tokens_by_hand():
    counts_EU = np.array([[1, 3, 5, 1, 4], [0, 0, 0, 1, 0]])
    found = statistics.top_tokens(counts_EU, np.array([1, 4, 10, 4, 8]), least=4, most=3)
    # Token 0 is rare, 2 and 4 have the same fraction and 2 is more frequent.
    assert found == [[(1, 0.75), (2, 0.5), (4, 0.5)], [(3, 0.25)]]


def test_by_question_by_hand():
    chosen_TLE = np.array([[[1, 0], [1, 1]], [[0, 1], [0, 1]], [[1, 1], [1, 0]]], bool)
    routing = Routing(np.zeros(3), np.array([0, 0, 1]), np.zeros(3), chosen_TLE, np.zeros(chosen_TLE.shape))
    model = Model(np.array([0, 1]), np.array([[1, 3], [1, 3]]), 4)
    ratio_QE, share_Q = statistics.by_question(routing, model)
    assert ratio_QE.tolist() == [[0.5, 0.75], [1, 0.5]]
    assert share_Q.tolist() == [(0.5 + 1.5 + 0.5 + 3) / 8, (1 + 3 + 1) / 8]


def test_questions_of_one_length_have_the_ratio_of_all_their_tokens(routing):
    even = Routing(
        routing.token_T, np.repeat(np.arange(40), 10), routing.loss_T, routing.chosen_TLE, routing.log_probs_TLE
    )
    ratio_QE, share_Q = statistics.by_question(even, MODEL)
    ratio_LE = routing.chosen_TLE.mean(0)
    np.testing.assert_allclose(ratio_QE.mean(0), ratio_LE.mean(0))
    of_all_L = statistics.activated_parameters(np.ones_like(ratio_LE), MODEL)
    np.testing.assert_allclose(share_Q.mean(), statistics.activated_parameters(ratio_LE, MODEL).sum() / of_all_L.sum())


def test_mean_and_error():
    mean, error = statistics.mean_and_error(np.array([1.0, 3.0, 5.0, 7.0]))
    assert mean == 4 and error == pytest.approx(1.96 * np.sqrt(20 / 3) / 2)
