"""Text drawn from a model. Legend: T tokens of the context, V vocabulary, N of it by falling probability."""

from collections.abc import Callable, Iterable, Iterator

import torch


@torch.no_grad()
def generate(
    model,
    prompt_T: list[int],
    count: int,
    *,
    temperature: float = 0.8,
    top_k: int | None = None,
    top_p: float = 1.0,
    seed: int = 0,
    stop_at: int | None = None,
) -> Iterator[int]:
    """Up to ``count`` tokens after ``prompt_T``, which must not be empty, one by one; see `draw`.

    model: of tools/evaluation/models.py; sees the last tokens that its context holds. stop_at: the token after which
    nothing more is drawn; it is not given.
    """
    generator = torch.Generator().manual_seed(seed)
    tokens = list(prompt_T)
    for _ in range(count):
        token = draw(model.next_logits(tokens), temperature, top_k, top_p, generator)
        if token == stop_at:
            return
        tokens.append(token)
        yield token


def draw(logits_V: torch.Tensor, temperature: float, top_k: int | None, top_p: float, generator) -> int:
    """A token by the probabilities softmax(logits / temperature) of the ``top_k`` likeliest, of these the fewest that
    add up to ``top_p``; temperature 0 takes the likeliest. Of equals the lower id comes first."""
    logits_N, token_N = logits_V.float().cpu().sort(descending=True, stable=True)
    if temperature == 0:
        return int(token_N[0])
    probs_N = torch.softmax((logits_N[:top_k] - logits_N[0]).double() / temperature, dim=-1)
    probs_N[probs_N.cumsum(0) - probs_N >= top_p] = 0  # never the first
    return int(token_N[torch.multinomial(probs_N, 1, generator=generator)])


def pieces(decode: Callable[[list[int]], str], prompt_T: list[int], tokens: Iterable[int]) -> Iterator[str]:
    """The text of ``prompt_T`` and ``tokens`` in pieces, each as soon as it is known; a character may take several
    tokens."""
    given = list(prompt_T)
    text = given_out = decode(given)
    yield text
    for token in tokens:
        given.append(token)
        text = decode(given)
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):
            yield text[len(given_out) :]
            given_out = text
    if text != given_out:
        yield text[len(given_out) :]
