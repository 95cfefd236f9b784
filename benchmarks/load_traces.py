"""Loads over time for eight workloads: rows that each expert gets, step by step.

The workloads are those of the MoE token-imbalance benchmark proposed for Megatron-LM (NVIDIA/Megatron-LM pull request
7488). Its figures are kept: a hot set is a quarter of the experts, three tokens of four choose all their experts in
it (the others among all experts), it moves every 3 steps in W6 and is hot in 1 step of 4 in W7. There every token's
choices are drawn; here only the number of rows of each expert, which is all a planner sees.

Letters: T steps, E experts, K experts a token, R ranks.
"""

from collections.abc import Sequence

import numpy as np

TRACES = {
    "W0": "balanced: every expert is equally likely",
    "W1": "hot expert set: the same quarter of the experts, anywhere, gets most rows",
    "W2": "hot rank: as W1, the hot experts on as few ranks as hold them",
    "W3": "spread hot: as W1, the hot experts at equal distances along the ranks",
    "W4": "source-ragged: ranks start with unequal numbers of tokens; by expert balanced, but noisier than W0",
    "W5": "no token: the experts of half of the ranks get no row",
    "W6": "rotating hot spot: as W2, moving on along the ranks every `period` steps",
    "W7": "burst: as W0, and as W2 in the last `burst` steps of every `period`",
}
PERIOD = {"W6": 3, "W7": 4}


def trace(
    name: str,
    steps: int,
    experts: int,
    ranks: int,
    seed: int | Sequence[int] = 0,
    tokens: int = 8192,
    topk: int = 2,
    heat: float = 0.75,
    period: int | None = None,
    burst: int = 1,
    jitter: float = 0.1,
    rank_E: Sequence[int] | None = None,
) -> np.ndarray:
    """tokens_TE [steps, experts], whole numbers; a step sums to tokens * topk, no expert gets more than `tokens`.

    seed: chooses the hot experts, the noise and the rank where W2, W5, W6 and W7 begin. heat: share of the tokens that
    choose hot experts only. period (PERIOD unless given), burst: in steps, for W6 and W7. jitter: standard deviation
    of the logarithm of an expert's share from step to step; rows are drawn one by one on top. rank_E: the rank that
    holds each expert (default: contiguous), along which W2, W3, W5, W6 and W7 lie. The same seed gives the same trace
    with the same version of numpy.

    W4: what a rank starts with does not show in loads by expert. Tokens of one rank resemble each other, so the fewer
    ranks most tokens come from, the less their tastes even out: with shares s_r ~ lognormal(0, 1) of the tokens, the
    jitter is sqrt(R * sum s_r^2) times as large.
    """
    period = PERIOD.get(name, 1) if period is None else period
    _check(name, steps, experts, ranks, tokens, topk, heat, period, burst, jitter, rank_E)
    rng = np.random.default_rng(seed)
    hot_TE = _hot(name, np.arange(steps)[:, None], experts, ranks, topk, rng, period, burst, rank_E)
    hot_T = hot_TE.sum(axis=1, keepdims=True)
    heat_T = np.where(hot_T > 0, 1.0 if name == "W5" else heat, 0.0)
    mean_TE = heat_T * hot_TE / np.maximum(hot_T, 1) + (1 - heat_T) / experts
    if name == "W4":
        tokens_R = rng.lognormal(0, 1, ranks)
        jitter *= np.sqrt(ranks * (tokens_R**2).sum()) / tokens_R.sum()
    mean_TE *= np.exp(jitter * rng.standard_normal(mean_TE.shape))
    tokens_TE = rng.multinomial(tokens * topk, mean_TE / mean_TE.sum(axis=1, keepdims=True))
    for step in np.flatnonzero((tokens_TE > tokens).any(axis=1)):  # a token chooses an expert once
        most_E = np.minimum(tokens_TE[step], tokens)
        room_E = np.where(mean_TE[step] > 0, tokens - most_E, 0)
        tokens_TE[step] = most_E + rng.multivariate_hypergeometric(room_E, tokens * topk - most_E.sum())
    return tokens_TE


def snapshot(name: str, experts: int, ranks: int, seed: int | Sequence[int] = 0, **options) -> np.ndarray:
    """tokens_E of one step, with `options` of `trace`; in W7 of a step in the burst."""
    return trace(name, options.get("period") or PERIOD.get(name, 1), experts, ranks, seed, **options)[-1]


def _hot(name, step_T1, experts, ranks, topk, rng, period, burst, rank_E) -> np.ndarray:
    """[T, E] whether an expert is hot; in W5, whether it gets any row."""
    rank_E = np.arange(experts) * ranks // experts if rank_E is None else np.asarray(rank_E)
    order_E = np.argsort(rank_E, kind="stable")
    begin = np.searchsorted(rank_E[order_E], rng.integers(ranks))
    along_E = np.empty(experts, dtype=int)  # how many experts along the ranks each one is from the beginning
    along_E[order_E] = (np.arange(experts) - begin) % experts
    number = max(topk, experts // 4)
    if name == "W1":
        along_E = rng.permutation(experts)
    if name == "W3":  # at equal distances: where the whole part of along * number / experts rises
        hot_E = (along_E * number) % experts < number
        return np.broadcast_to(hot_E, (step_T1.size, experts))
    if name == "W5":
        number = experts - experts // 2
    at_T1 = step_T1 // period * number if name == "W6" else np.zeros_like(step_T1)
    hot_TE = (along_E - at_T1) % experts < number
    if name == "W7":
        hot_TE &= step_T1 % period >= period - burst
    return hot_TE & (name not in ("W0", "W4"))


def _check(name, steps, experts, ranks, tokens, topk, heat, period, burst, jitter, rank_E) -> None:
    if name not in TRACES:
        raise ValueError(f"trace {name!r:.80}: give one of {', '.join(TRACES)}")
    checks = {
        f"{steps} steps, {ranks} ranks, {tokens} tokens, top-{topk}: each is at least 1": min(
            steps, ranks, tokens, topk
        )
        >= 1,
        f"{experts} experts, top-{topk}: give at least twice top-k experts": experts >= 2 * topk,
        f"heat {heat}: a share from 0 to 1": 0 <= heat <= 1,
        f"jitter {jitter}: from 0 to 10": 0 <= jitter <= 10,
        f"period {period}, burst {burst}: at least 1 step, a burst no longer than the period": period >= 1
        and (name != "W7" or 1 <= burst <= period),
        f"rank_E: give the rank of each of {experts} experts, from 0 to {ranks - 1}": rank_E is None
        or (len(rank_E) == experts and min(rank_E) >= 0 and max(rank_E) < ranks),
    }
    if wrong := [text for text, right in checks.items() if not right]:
        raise ValueError(f"trace {name}: " + "; ".join(wrong))
