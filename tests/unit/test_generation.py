"""What is drawn, and when its text is known."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hmoe_megatron.tools.evaluation.models import HuggingFaceModel
from hmoe_megatron.tools.evaluation.text import draw, generate, pieces

LOGITS_V = torch.log(torch.tensor([0.1, 0.4, 0.05, 0.3, 0.15]))


def drawn(**changed):
    """Share of each token."""
    generator = torch.Generator().manual_seed(0)
    how = {"temperature": 1.0, "top_k": None, "top_p": 1.0} | changed
    tokens = [draw(LOGITS_V, generator=generator, **how) for _ in range(4000)]
    return torch.bincount(torch.tensor(tokens), minlength=5) / len(tokens)


def close(found_V, expected):
    torch.testing.assert_close(found_V, torch.tensor(expected), rtol=0, atol=0.03)


def test_tokens_are_drawn_by_their_probabilities():
    close(drawn(), [0.1, 0.4, 0.05, 0.3, 0.15])


def test_a_low_temperature_sharpens():
    squares = LOGITS_V.exp() ** 2
    close(drawn(temperature=0.5), (squares / squares.sum()).tolist())


def test_top_k_and_top_p_leave_the_likeliest():
    close(drawn(top_k=2), [0, 4 / 7, 0, 3 / 7, 0])
    close(drawn(top_p=0.69), [0, 4 / 7, 0, 3 / 7, 0])
    close(drawn(top_p=0.71), [0, 0.4 / 0.85, 0, 0.3 / 0.85, 0.15 / 0.85])
    close(drawn(top_k=3, top_p=0.6), [0, 4 / 7, 0, 3 / 7, 0])  # of what top_k left: 0.47, 0.35, 0.18


def test_the_likeliest_of_equals_is_the_lower_id():
    generator = torch.Generator()
    for temperature, top_k, top_p in ((0, None, 1.0), (1.0, 1, 1.0), (1.0, None, 1e-9)):
        assert draw(torch.tensor([0.0, 2.0, 2.0]), temperature, top_k, top_p, generator) == 1


@pytest.mark.parametrize("temperature", [1e-40, 1e-300, 1e6])
def test_any_temperature_draws(temperature):
    token = draw(LOGITS_V, temperature, None, 1.0, torch.Generator().manual_seed(0))
    assert token == 1 or temperature > 1


def test_a_model_without_a_cache_is_given_all_tokens():
    class NoCache:
        def __call__(self, input_ids, past_key_values, use_cache):
            logits = torch.nn.functional.one_hot(input_ids.cumsum(1), 20).float()
            return SimpleNamespace(logits=logits, past_key_values=None)

    model = HuggingFaceModel.__new__(HuggingFaceModel)
    model.__dict__ |= {
        "module": NoCache(),
        "device": "cpu",
        "context": 9,
        "vocabulary": 20,
        "_cache": None,
        "_seen": [],
    }
    assert [int(model.next_logits(tokens).argmax()) for tokens in ([1, 2, 3], [1, 2, 3, 4])] == [6, 10]


class Counting:
    """Says the number after the last token, to 9, then 0."""

    def next_logits(self, tokens):
        return torch.nn.functional.one_hot(torch.tensor((tokens[-1] + 1) % 10), 10).float() * 50


def test_it_stops_at_the_end_of_the_document_or_the_count():
    assert list(generate(Counting(), [3], 4)) == [4, 5, 6, 7]
    assert list(generate(Counting(), [3], 40, stop_at=7)) == [4, 5, 6]


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=30), st.text(max_size=5))
def test_pieces_are_whole_characters_and_add_up(text, prompt):
    """Tokens are bytes here."""

    def decode(tokens):
        return bytes(tokens).decode(errors="replace")

    text, prompt = (given.replace("\N{REPLACEMENT CHARACTER}", "") for given in (text, prompt))
    told = list(pieces(decode, list(prompt.encode()), text.encode()))
    assert "".join(told) == prompt + text and "\N{REPLACEMENT CHARACTER}" not in "".join(told)


def test_a_character_that_is_never_finished_is_told_at_the_end():
    told = list(pieces(lambda tokens: bytes(tokens).decode(errors="replace"), [97], "é".encode()[:1]))
    assert told == ["a", "\N{REPLACEMENT CHARACTER}"]
