"""Perplexity and bits a byte of held-out text.

Of documents d with n_d tokens, b_d bytes of UTF-8 and loss L_d, the sum of -ln p(token | tokens before it):
perplexity = exp(sum L / sum n), bits a byte = sum L / (sum b * ln 2). The first token follows the end of a document,
as in training; the end of the document itself is no text and is not counted.
"""

import math
from collections.abc import Sequence

import numpy as np

from hmoe_megatron.tools.evaluation.models import Model
from hmoe_megatron.tools.evaluation.scoring import Limits, scores


def added_tokens(model: Model) -> list[int]:
    """What the tokenizer puts before every text by itself. Raises ValueError for one that puts something behind it."""
    try:
        added, letter = model.encode(""), model.encode("a")
    except ValueError as error:
        raise ValueError(f"its tokenizer does not encode text ({error}): give a model trained on text") from None
    if added and letter[-1] == added[-1]:
        problem = f"the tokenizer puts token {added[-1]} behind every text, where no continuation can follow"
        raise ValueError(f"{problem}: turn that off in its configuration")
    return added


def evaluate_text(model: Model, texts: Sequence[str], limits: Limits, what: str = "") -> dict:
    """Of all `texts` together, each read by itself: {"documents", "tokens", "bytes", "perplexity",
    "perplexity_stderr", "bits_per_byte", "bits_per_byte_stderr"}; standard errors are None of a single document."""
    added = added_tokens(model)
    beginning = added or [model.end_of_document]
    documents = [(beginning + model.encode(text)[len(added) :], len(beginning)) for text in texts]
    losses_D = np.array([-log_likelihood for log_likelihood, _ in scores(model, documents, limits, what)])
    tokens_D = np.array([len(tokens) - first for tokens, first in documents])
    bytes_D = np.array([len(text.encode()) for text in texts])
    loss, loss_stderr = ratio(losses_D, tokens_D)
    bits, bits_stderr = ratio(losses_D / math.log(2), bytes_D)
    return {
        "documents": len(texts),
        "tokens": int(tokens_D.sum()),
        "bytes": int(bytes_D.sum()),
        "perplexity": math.exp(loss),
        "perplexity_stderr": None if loss_stderr is None else math.exp(loss) * loss_stderr,
        "bits_per_byte": bits,
        "bits_per_byte_stderr": bits_stderr,
    }


def ratio(above_D: np.ndarray, below_D: np.ndarray) -> tuple[float, float | None]:
    """sum above / sum below and its standard error over D independent documents (the delta method), None for D = 1."""
    value, count = float(above_D.sum() / below_D.sum()), len(above_D)
    if count < 2:
        return value, None
    residuals_D = above_D - value * below_D
    return value, float(math.sqrt(count / (count - 1) * (residuals_D**2).sum()) / below_D.sum())
