"""A routing made up, for tests of pictures and page without a model."""

import numpy as np

from hmoe_megatron.tools.report.statistics import Model, Routing

WIDTHS = (144, 176, 208, 240, 272, 304, 336, 368)


def make_model(layers=4, widths=WIDTHS):
    return Model(np.arange(layers), np.array([widths] * layers), hidden_size=64)


def make_routing(model, tokens=4000, windows=40, seed=0, top_p=0.6, vocabulary=300, harder=0.0):
    """Hard tokens want wide experts; `harder` makes all tokens harder."""
    random = np.random.default_rng(seed)
    token_T = np.minimum(random.zipf(1.3, tokens), vocabulary) - 1
    hard_T = token_T / vocabulary + random.normal(0, 0.2, tokens) + harder
    slope_E = np.linspace(-1, 1, model.width_LE.shape[1])[np.argsort(model.expert_E)]
    taste_VLE = random.normal(0, 1, (vocabulary, *model.width_LE.shape))
    logits_TLE = taste_VLE[token_T] + 2 * hard_T[:, None, None] * slope_E
    probs_TLE = np.exp(logits_TLE)
    probs_TLE /= probs_TLE.sum(-1, keepdims=True)
    order_TLE = np.argsort(-probs_TLE, axis=-1)
    sorted_TLE = np.take_along_axis(probs_TLE, order_TLE, -1)
    chosen_TLE = np.zeros(probs_TLE.shape, bool)
    np.put_along_axis(chosen_TLE, order_TLE, sorted_TLE.cumsum(-1) - sorted_TLE < top_p, -1)
    window_T = np.sort(np.arange(tokens) % windows)
    loss_T = np.exp(hard_T + random.normal(0, 0.3, tokens)).astype(np.float32)
    loss_T[np.flatnonzero(np.diff(window_T, prepend=-1))] = np.nan
    return Routing(token_T, window_T, loss_T, chosen_TLE, np.log(probs_TLE).astype(np.float32))
