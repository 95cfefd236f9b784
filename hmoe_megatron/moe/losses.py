"""The router's losses, each as a pure function of routing statistics.

Shapes: T tokens of the micro-batch over all ranks that share it, E logical experts. Under sequence or context
parallelism a rank passes ``counts_E`` and ``num_tokens`` of the whole micro-batch and probabilities of its own tokens;
the losses of the ranks then add up to the loss of the micro-batch, and so do their gradients.
"""

import torch


def p_penalty(
    counts_E: torch.Tensor, prob_sum_E: torch.Tensor, relative_width_E: torch.Tensor, num_tokens: torch.Tensor | int
) -> torch.Tensor:
    """P-Penalty N * sum_i M_i Phat_i with M_i = (counts_i / T) h_i, Phat_i = prob_sum_i / T (arXiv 2408.10681, eq. 4).

    counts_E: tokens that chose each expert, a count, so no gradient flows through it. prob_sum_E: float32 sum over
    tokens of the softmax over all experts. relative_width_E: h_i = width_i / mean width, not the raw width, since only
    then does the P-Penalty equal the load-balance loss at equal widths, as the paper says it does.
    Returns a float32 scalar.
    """
    num_experts = counts_E.shape[0]
    penalty_E = counts_E.detach().to(prob_sum_E.dtype) * relative_width_E
    return (prob_sum_E * penalty_E).sum() * num_experts / (num_tokens * num_tokens)


def load_balance(counts_E: torch.Tensor, prob_sum_E: torch.Tensor, num_tokens: torch.Tensor | int) -> torch.Tensor:
    """Load balance N * sum_i T_i Phat_i (arXiv 2408.10681, eq. 3): K at perfect balance; Megatron's is divided by K."""
    return p_penalty(counts_E, prob_sum_E, torch.ones_like(prob_sum_E), num_tokens)


def router_entropy(log_probs_TE: torch.Tensor, valid_T: torch.Tensor | None, num_tokens: torch.Tensor | int):
    """Mean over tokens of -sum_i P_i log P_i, in nats (arXiv 2403.07652, eq. 7).

    Equation 5 of arXiv 2408.10681 prints N * sum P_i log P_i without the minus, which, minimised, would spread the
    routing instead of sharpening it: against what the paper uses the loss for. Ours has the minus and no N.
    valid_T: False for padding; None counts every token. Returns a float32 scalar.
    """
    entropy_T = -(log_probs_TE.exp() * log_probs_TE).sum(dim=-1)
    if valid_T is not None:
        entropy_T = entropy_T * valid_T
    return entropy_T.sum() / num_tokens
