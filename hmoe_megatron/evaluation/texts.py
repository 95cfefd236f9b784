"""Perplexity and bits a byte of held-out text.

Of documents d with n_d tokens, b_d bytes of UTF-8 and loss L_d, the sum of -ln p(token | tokens before it):
perplexity = exp(sum L / sum n), bits a byte = sum L / (sum b * ln 2). The first token follows the end of a document,
as in training; the end of the document itself is no text and is not counted.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from hmoe_megatron.evaluation.models import Model
from hmoe_megatron.evaluation.scoring import Limits, Tokens, scores


@dataclass(frozen=True)
class TextResult:
    """Standard errors are over documents; None of a single one."""

    documents: int
    tokens: int
    bytes: int
    perplexity: float
    perplexity_stderr: float | None
    bits_per_byte: float
    bits_per_byte_stderr: float | None


def added_tokens(model: Model) -> list[int]:
    """What the tokenizer puts before every text by itself. Raises ValueError for one that puts something behind it."""
    try:
        added, letter = model.encode(""), model.encode("a")
    except ValueError as error:
        raise ValueError(f"its tokenizer does not encode text ({error}): give a model trained on text") from None
    if added and letter[-1] == added[-1]:
        raise ValueError(f"the tokenizer puts token {added[-1]} behind every text, where no continuation can follow: "
                         "turn that off in its configuration")  # fmt: skip
    return added


def document_tokens(model: Model, text: str, added: Sequence[int]) -> Tokens:
    """A document's tokens to be scored, behind what begins a document."""
    beginning = list(added) or [model.end_of_document]
    return Tokens(beginning + model.encode(text)[len(added) :], len(beginning))


def evaluate_text(model: Model, texts: Sequence[str], limits: Limits, what: str = "") -> TextResult:
    """Of all `texts` together, each read by itself."""
    added = added_tokens(model)
    documents = [document_tokens(model, text, added) for text in texts]
    losses_D = np.array([-score.log_likelihood for score in scores(model, documents, limits, what)])
    tokens_D = np.array([len(tokens) - first for tokens, first in documents])
    bytes_D = np.array([len(text.encode()) for text in texts])
    loss, loss_stderr = ratio(losses_D, tokens_D)
    bits, bits_stderr = ratio(losses_D / math.log(2), bytes_D)
    perplexity = math.exp(loss)
    return TextResult(len(texts), int(tokens_D.sum()), int(bytes_D.sum()), perplexity,
                      None if loss_stderr is None else perplexity * loss_stderr, bits, bits_stderr)  # fmt: skip


def ratio(above_D: np.ndarray, below_D: np.ndarray) -> tuple[float, float | None]:
    """sum above / sum below and its standard error over D independent documents (the delta method), None for D = 1."""
    value, count = float(above_D.sum() / below_D.sum()), len(above_D)
    if count < 2:
        return value, None
    residuals_D = above_D - value * below_D
    return value, float(math.sqrt(count / (count - 1) * (residuals_D**2).sum()) / below_D.sum())
