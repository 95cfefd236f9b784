"""Log-likelihoods of tokens given those before them. Legend: B rows of a batch, T tokens of a row, V vocabulary."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from hmoe_megatron.tools.evaluation.models import Model


@dataclass(frozen=True)
class Limits:
    """context: most tokens that predict one. stride: tokens that a further window scores; None: `context` of them.
    batch_tokens: most tokens of a forward pass, except that a row is never divided."""

    context: int
    stride: int | None = None
    batch_tokens: int = 4096


def windows(length: int, first: int, limits: Limits) -> Iterator[tuple[int, int, int]]:
    """(start, begin, end) of windows that read tokens start to end and score tokens begin to end; together they score
    tokens `first` to `length` once, in order. Every window but that of a short beginning is full.

    A window reads the `context` tokens before its last one, so the last window of a long text, though it scores few
    tokens, reads as many as the others. lm-eval's rolling windows are those of stride None.
    """
    begin, stride = first, limits.stride or limits.context
    while begin < length:
        end = min(max(begin + stride, limits.context + 1), length, begin + limits.context)
        yield max(0, end - limits.context - 1), begin, end
        begin = end


@torch.inference_mode()
def scores(
    model: Model, sequences: Sequence[tuple[list[int], int]], limits: Limits, what: str = ""
) -> list[tuple[float, bool]]:
    """(log-likelihood, whether each token was the likeliest) of each of `sequences`, (tokens, number of the first that
    is scored, at least 1). `what` is written beside the bar of progress, which only a terminal shows.

    Raises ValueError for a model whose logits are not finite.
    """
    rows = [
        (number, tokens[start:end], end - begin)
        for number, (tokens, first) in enumerate(sequences)
        for start, begin, end in windows(len(tokens), first, limits)
    ]
    rows.sort(key=lambda row: len(row[1]), reverse=True)  # stable: batches depend on nothing but the tokens
    sums, greedy, at = [0.0] * len(sequences), [True] * len(sequences), 0
    with tqdm(total=len(rows), desc=what, disable=None, leave=False) as bar:
        while at < len(rows):
            batch = rows[at : at + max(1, limits.batch_tokens // len(rows[at][1]))]
            # Rows are padded at their end, where no token before it looks.
            tokens_BT = pad_sequence([torch.tensor(tokens) for _, tokens, _ in batch], batch_first=True)
            for (number, tokens, count), logits_TV in zip(batch, model.logits(tokens_BT[:, :-1]), strict=True):
                end = len(tokens) - 1
                log_likelihood, is_greedy = _score(logits_TV[end - count : end], tokens[-count:])
                sums[number] += log_likelihood
                greedy[number] &= is_greedy
            at += len(batch)
            bar.update(len(batch))
    if not all(map(math.isfinite, sums)):
        raise ValueError("its logits are not all finite: the weights are damaged, or their dtype is too small")
    return list(zip(sums, greedy, strict=True))


def _score(logits_TV: torch.Tensor, tokens: list[int]) -> tuple[float, bool]:
    tokens_T = torch.tensor(tokens, device=logits_TV.device)
    log_likelihood_T = torch.log_softmax(logits_TV, dim=-1).gather(1, tokens_T[:, None])
    return float(log_likelihood_T.double().sum()), bool((logits_TV.argmax(dim=-1) == tokens_T).all())
