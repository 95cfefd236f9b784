"""Windows and log-likelihoods, by hand, on models whose probabilities are known."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hmoe_megatron.tools.evaluation.scoring import Limits, scores, windows
from tests.unit.evaluation.stand_in import END, Bigram, Cumulative, Uniform

TEXTS = ["a", "The cat sat.", "to be, or not to be", "Yes: it is (always) so!", "b"]
FLOAT32 = 1e-5  # of a sum of up to some hundred log-probabilities, relative


def limits(context=512, stride=None, batch_tokens=4096):
    return Limits(context, stride, batch_tokens)


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 200), st.integers(1, 30), st.integers(1, 40), st.data())
def test_every_token_is_scored_once_with_all_the_context_there_is(length, first, context, data):
    stride = data.draw(st.none() | st.integers(1, context))
    found = list(windows(length, first, limits(context, stride)))
    assert [token for _, begin, end in found for token in range(begin, end)] == list(range(first, length))
    for start, begin, end in found:
        assert 0 <= start < begin and end - start == min(end, context + 1)
    assert all(end - begin <= (stride or context) for _, begin, end in found[1:])


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 200), st.integers(1, 40))
def test_windows_are_those_of_lm_eval(length, context):
    utils = pytest.importorskip("lm_eval.utils", reason="lm-eval is not installed: pip install 'hmoe-megatron[eval]'")
    tokens = list(range(length))
    theirs = list(utils.get_rolling_token_windows(tokens, -1, context, 1))
    whole = [-1, *tokens]
    found = windows(length + 1, 1, limits(context))
    ours = [(whole[start : end - 1], whole[begin:end]) for start, begin, end in found]
    assert ours == theirs


@pytest.mark.parametrize("batch_tokens", [1, 30, 4096])
def test_log_likelihoods_and_greedy_flags_by_hand(batch_tokens):
    model = Bigram()
    sequences = [([END, *model.encode(text)], 1) for text in TEXTS]
    found = scores(model, sequences, limits(batch_tokens=batch_tokens))
    for text, score in zip(TEXTS, found, strict=True):
        assert score[0] == pytest.approx(model.expected(text, END)[0], rel=FLOAT32)
        assert score[1] == model.expected(text, END)[1]
    assert all(rows * tokens <= batch_tokens or rows == 1 for rows, tokens in model.shapes)
    assert sum(rows for rows, _ in model.shapes) == len(TEXTS)


def test_the_likeliest_continuation_is_greedy_and_another_is_not():
    model = Bigram()
    likeliest = [END]
    for _ in range(5):
        likeliest.append(int(model.table_VV[likeliest[-1]].argmax()))
    other = [*likeliest[:-1], (likeliest[-1] + 1) % model.vocabulary]
    found = scores(model, [(likeliest, 1), (other, 1), (other, 4)], limits())
    assert [score[1] for score in found] == [True, False, False]
    assert found[2][0] < 0


def test_only_the_continuation_is_scored():
    model = Bigram()
    tokens = model.encode("cat sat")
    (score,) = scores(model, [(tokens, 4)], limits())
    assert score[0] == pytest.approx(model.expected("sat", tokens[3])[0], rel=FLOAT32)


def test_no_row_sees_another_or_the_padding():
    model = Cumulative()
    sequences = [([END, *model.encode(text)], 1) for text in TEXTS]
    together = scores(model, sequences, limits())
    assert len(model.shapes) == 1
    for sequence, score in zip(sequences, together, strict=True):
        (alone,) = scores(model, [sequence], limits())
        assert alone[0] == pytest.approx(score[0], rel=FLOAT32)


def test_a_context_that_is_too_long_loses_its_beginning():
    model, tokens = Cumulative(context=8), list(range(1, 31))
    (score,) = scores(model, [(tokens, 27)], limits(8))
    (kept,) = scores(model, [(tokens[-9:], 6)], limits(8))
    assert score == kept and model.shapes[0] == (1, 8)
    (whole,) = scores(Cumulative(), [(tokens, 27)], limits())
    assert whole != score


def test_a_continuation_longer_than_the_context_is_the_sum_of_its_windows():
    model, tokens = Bigram(context=4), list(range(1, 31))
    (score,) = scores(model, [(tokens, 2)], limits(4))
    (whole,) = scores(model, [(tokens, 2)], limits())
    assert score[0] == pytest.approx(whole[0], rel=FLOAT32)


def test_nothing_to_score_asks_nothing():
    model = Uniform()
    assert scores(model, [], limits()) == [] and scores(model, [([END], 1)], limits()) == [(0.0, True)]
    assert model.shapes == []


@pytest.mark.parametrize("broken", [float("nan"), float("inf"), float("-inf")])
def test_logits_that_are_not_finite_are_refused(broken):
    model = Bigram()
    model.table_VV[:, 5] = broken
    with pytest.raises(ValueError, match="logits are not all finite"):
        scores(model, [([END, 5, 6], 1)], limits())
