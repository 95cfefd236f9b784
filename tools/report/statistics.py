"""What the report says of a model's routing. Pure numpy.

The formulas of similarity, synergy and difficulty are our reading: of the paper (arXiv 2408.10681) we know that it
shows a Wasserstein distance and a KL divergence between experts' token distributions, and experts' shares by token
difficulty, but not on what line the tokens lie, over what the divergence is taken, or how a layer's figure is made.

Legend: T tokens, L MoE layers, E logical experts, U different tokens, D parts of the tokens, Q questions.
"""

from dataclasses import dataclass

import numpy as np

from hmoe_megatron.telemetry.accounting import expert_parameters

PARTS = 10  # deciles
Z_95 = 1.96  # standard errors on each side of a mean that hold it 19 times in 20


@dataclass(frozen=True)
class Model:
    """layer_L: decoder layers (from 0) that hold experts; width_LE: int; hidden_size."""

    layer_L: np.ndarray
    width_LE: np.ndarray
    hidden_size: int

    @property
    def expert_E(self) -> np.ndarray:
        """Logical experts from narrow to wide, by their mean width over layers."""
        return np.argsort(self.width_LE.mean(0), kind="stable")


@dataclass(frozen=True)
class Routing:
    """Tokens in windows that the model saw one by one; experts in the model's order.

    token_T: ids. window_T: ascending from 0. loss_T: -log p(token | those before it in its window), in nats; NaN for
    the first of a window. chosen_TLE: bool. log_probs_TLE: float32, log softmax of the router's logits, all experts.
    """

    token_T: np.ndarray
    window_T: np.ndarray
    loss_T: np.ndarray
    chosen_TLE: np.ndarray
    log_probs_TLE: np.ndarray


def activated_parameters(ratio_LE: np.ndarray, model: Model) -> np.ndarray:
    """Parameters of a layer's experts that a token activates, mean over tokens, [L]: 3 H sum_i ratio_i width_i."""
    return expert_parameters(model.hidden_size, (ratio_LE * model.width_LE).sum(1))


def token_counts(token_T: np.ndarray, chosen_TE: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(ids_U ascending, total_U: how often each is in the text, counts_EU: how often it chose each expert)."""
    ids_U, index_T, total_U = np.unique(token_T, return_inverse=True, return_counts=True)
    counts_EU = np.stack([np.bincount(index_T[chosen_T], minlength=len(ids_U)) for chosen_T in chosen_TE.T])
    return ids_U, total_U, counts_EU


def similarity(counts_EU: np.ndarray, total_U: np.ndarray) -> np.ndarray:
    """1-Wasserstein distance between the token distributions of every two experts, [E, E]; 0: the same, below 1.

    q_i(u) = counts_iu / sum_u counts_iu. A Wasserstein distance needs a distance between tokens; ids have none that
    means anything. Here tokens lie on a line from frequent to rare, each in the middle of its share of the text, so
    that W(i, j) = integral |Q_i - Q_j| over that line is how much of the text lies between what i and j take: experts
    of frequent and of rare words are far from each other, experts of different words that are equally frequent are not.
    Rows and columns of experts without a token are NaN.
    """
    order_U = np.argsort(-total_U, kind="stable")
    total_U, counts_EU = total_U[order_U] / total_U.sum(), counts_EU[:, order_U]
    gap_U = np.diff(np.cumsum(total_U) - total_U / 2)
    with np.errstate(invalid="ignore"):
        cumulative_EU = np.cumsum(counts_EU, axis=1) / counts_EU.sum(1, keepdims=True)
    return np.stack([np.abs(cumulative_EU - row_U)[:, :-1] @ gap_U for row_U in cumulative_EU])


def synergy(log_probs_TE: np.ndarray) -> np.ndarray:
    """KL(a_i || a_j) in nats for expert i of the row and j of the column, [E, E]; 0 where both want the same tokens.

    a_i(t) = P_i(t) / sum_t P_i(t), P the softmax over all experts: how expert i's weight lies on the tokens of the
    text, each at its place. Unlike the choice itself P is never 0, so the divergence is finite without smoothing.
    KL(a_i || a_j) = sum_t P_i (log P_i - log P_j) / S_i - log S_i + log S_j with S_i = sum_t P_i.
    """
    log_probs_TE = log_probs_TE.astype(np.float64)
    probs_TE = np.exp(log_probs_TE)
    sum_E, cross_EE = probs_TE.sum(0), probs_TE.T @ log_probs_TE
    divergence_EE = (np.diag(cross_EE)[:, None] - cross_EE) / sum_E[:, None]
    return np.maximum(divergence_EE - np.log(sum_E)[:, None] + np.log(sum_E), 0)  # rounding may leave -1e-16


def shares_by_difficulty(
    chosen_TLE: np.ndarray, loss_T: np.ndarray, parts: int = PARTS
) -> tuple[np.ndarray, np.ndarray]:
    """(share_DE, loss_D): tokens in equal parts from easy to hard; of a part's routed tokens, each expert's share.

    A token is as hard as the model's own loss on it (see Routing), and it is the token that the experts were given,
    not the one they help to predict. Shares sum to 1 and are means over layers; loss_D is the part's mean. Tokens
    without a loss are left out. Raises ValueError for fewer tokens than parts.
    """
    known_N = np.flatnonzero(np.isfinite(loss_T))
    if len(known_N) < parts:
        raise ValueError(f"{len(known_N)} tokens with a loss are too few for {parts} parts; give more text")
    part_DN = np.array_split(known_N[np.argsort(loss_T[known_N], kind="stable")], parts)
    counts_DLE = np.stack([chosen_TLE[part_N].sum(0) for part_N in part_DN])
    share_DLE = counts_DLE / counts_DLE.sum(2, keepdims=True)
    return share_DLE.mean(1), np.array([loss_T[part_N].mean() for part_N in part_DN])


def top_tokens(counts_EU: np.ndarray, total_U: np.ndarray, least: int, most: int) -> list[list[tuple[int, float]]]:
    """For each expert up to `most` (u, fraction of that token's occurrences that chose it), the largest first.

    Only tokens that occur in the text at least `least` times; of equal fractions the more frequent token, then the
    lower u, comes first. By fraction and not by number, or every expert's first would be the text's most frequent.
    """
    frequent_V = np.flatnonzero(total_U >= least)
    found = []
    for counts_U in counts_EU:
        ratio_V = counts_U[frequent_V] / total_U[frequent_V]
        order_V = np.lexsort((frequent_V, -total_U[frequent_V], -ratio_V))[:most]
        found.append([(int(frequent_V[v]), float(ratio_V[v])) for v in order_V if ratio_V[v] > 0])
    return found


def by_question(routing: Routing, model: Model) -> tuple[np.ndarray, np.ndarray]:
    """(ratio_QE: fraction of a question's tokens that activate each expert, mean over layers; share_Q: of all experts'
    parameters, those that a token of the question activates). A window is a question."""
    starts_Q = np.flatnonzero(np.diff(routing.window_T, prepend=-1))
    tokens_Q = np.diff(starts_Q, append=len(routing.window_T))
    ratio_QLE = np.add.reduceat(routing.chosen_TLE, starts_Q, axis=0, dtype=float) / tokens_Q[:, None, None]
    return ratio_QLE.mean(1), (ratio_QLE * model.width_LE).sum((1, 2)) / model.width_LE.sum()


def mean_and_error(values_QX: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(mean over questions, half of its 95 % interval by the normal approximation); two questions at least."""
    return values_QX.mean(0), Z_95 * values_QX.std(0, ddof=1) / np.sqrt(len(values_QX))
