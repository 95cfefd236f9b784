"""Log-likelihoods of tokens given those before them. Legend: B rows of a batch, T tokens of a row, V vocabulary."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from tqdm import tqdm

from hmoe_megatron.evaluation.models import Model


class Tokens(NamedTuple):
    """tokens; those from number `first` on are scored. There must be one before it."""

    tokens: list[int]
    first: int


class Window(NamedTuple):
    """Tokens start to end are read, tokens begin to end are scored."""

    start: int
    begin: int
    end: int


class Score(NamedTuple):
    """log_likelihood: sum over the scored tokens, natural logarithm. is_greedy: each was the likeliest one."""

    log_likelihood: float
    is_greedy: bool


@dataclass(frozen=True)
class Limits:
    """context: most tokens that predict one. stride: tokens that a further window scores; None: `context` of them.
    batch_tokens: most tokens of a forward pass, except that a row is never divided."""

    context: int
    stride: int | None = None
    batch_tokens: int = 4096


def windows(length: int, first: int, limits: Limits) -> Iterator[Window]:
    """Tokens `first` to `length`, each scored once, in order; every window but that of a short beginning is full.

    A window reads the `context` tokens before its last one, so the last window of a long text, though it scores few
    tokens, reads as many as the others. lm-eval's rolling windows are those of stride None.
    """
    begin, stride = first, limits.stride or limits.context
    while begin < length:
        end = min(max(begin + stride, limits.context + 1), length, begin + limits.context)
        yield Window(max(0, end - limits.context - 1), begin, end)
        begin = end


@torch.inference_mode()
def scores(model: Model, sequences: Sequence[Tokens], limits: Limits, what: str = "") -> list[Score]:
    """A score a sequence. `what` is written beside the bar of progress, which only a terminal shows.

    Raises ValueError for a model whose logits are not finite.
    """
    rows = [(number, tokens[window.start : window.end], window.end - window.begin)
            for number, (tokens, first) in enumerate(sequences)
            for window in windows(len(tokens), first, limits)]  # fmt: skip
    rows.sort(key=lambda row: len(row[1]), reverse=True)  # stable: batches depend on nothing but the tokens
    sums, greedy = [0.0] * len(sequences), [True] * len(sequences)
    with tqdm(total=len(rows), desc=what, disable=None, leave=False) as bar:
        for batch in _batches(rows, limits.batch_tokens):
            for (number, _, _), score in zip(batch, _batch_scores(model, batch), strict=True):
                sums[number] += score.log_likelihood
                greedy[number] &= score.is_greedy
            bar.update(len(batch))
    if not all(map(math.isfinite, sums)):
        raise ValueError("its logits are not all finite: the weights are damaged, or their dtype is too small")
    return list(map(Score, sums, greedy))


def _batches(rows: list, batch_tokens: int) -> Iterator[list]:
    """Rows in their order, the first of a batch the longest."""
    start = 0
    while start < len(rows):
        end = start + max(1, batch_tokens // len(rows[start][1]))
        yield rows[start:end]
        start = end


def _batch_scores(model: Model, batch: list) -> list[Score]:
    """Rows are padded at their end, where no token before it looks."""
    tokens_BT = torch.zeros(len(batch), len(batch[0][1]) - 1, dtype=torch.long)
    for row, (_, tokens, _) in enumerate(batch):
        tokens_BT[row, : len(tokens) - 1] = torch.tensor(tokens[:-1])
    logits_BTV = model.logits(tokens_BT)
    return [_score(logits_TV[len(tokens) - 1 - count : len(tokens) - 1], tokens[-count:])
            for logits_TV, (_, tokens, count) in zip(logits_BTV, batch, strict=True)]  # fmt: skip


def _score(logits_TV: torch.Tensor, tokens: list[int]) -> Score:
    tokens_T = torch.tensor(tokens, device=logits_TV.device)
    log_likelihood_T = torch.log_softmax(logits_TV, dim=-1).gather(1, tokens_T[:, None])
    greedy = bool((logits_TV.argmax(dim=-1) == tokens_T).all())
    return Score(float(log_likelihood_T.double().sum()), greedy)
