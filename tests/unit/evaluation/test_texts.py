"""Perplexity and bits a byte by hand, and their standard errors."""

import json
import math

import numpy as np
import pytest

from hmoe_megatron.tools.evaluation.inputs import read_documents
from hmoe_megatron.tools.evaluation.scoring import Limits
from hmoe_megatron.tools.evaluation.texts import evaluate_text, ratio
from tests.unit.evaluation.stand_in import END, VOCABULARY, Bigram, Uniform

TEXTS = ["The cat sat.", "to be, or not to be", "b"]
LIMITS = Limits(512)


def test_a_uniform_models_perplexity_is_its_vocabulary():
    found = evaluate_text(Uniform(), TEXTS, LIMITS)
    assert found["perplexity"] == pytest.approx(VOCABULARY, rel=1e-6)
    assert found["perplexity_stderr"] == pytest.approx(0, abs=1e-4)
    assert found["bits_per_byte"] == pytest.approx(math.log2(VOCABULARY), rel=1e-6)
    assert (found["documents"], found["tokens"], found["bytes"]) == (3, sum(map(len, TEXTS)), sum(map(len, TEXTS)))


def test_bytes_are_those_of_utf8():
    found = evaluate_text(Uniform(), ["aé", "😀b"], LIMITS)  # four tokens, 3 and 5 bytes
    assert (found["tokens"], found["bytes"]) == (4, 8)
    assert found["perplexity"] == pytest.approx(VOCABULARY, rel=1e-6)
    assert found["bits_per_byte"] == pytest.approx(4 * math.log2(VOCABULARY) / 8, rel=1e-6)


@pytest.mark.parametrize(("context", "stride"), [(512, None), (4, None), (4, 1), (5, 3)])
def test_documents_are_read_apart_after_the_end_of_a_document(context, stride):
    model = Bigram()
    loss = -sum(model.expected(text, END)[0] for text in TEXTS)
    found = evaluate_text(model, TEXTS, Limits(context, stride))
    assert math.log(found["perplexity"]) == pytest.approx(loss / found["tokens"], rel=1e-6)
    assert found["bits_per_byte"] == pytest.approx(loss / math.log(2) / found["bytes"], rel=1e-6)
    errors = (found["perplexity_stderr"], found["bits_per_byte_stderr"])
    assert errors[0] / found["perplexity"] == pytest.approx(errors[1] * math.log(2), rel=1e-6) and errors[1] > 0


def test_a_token_that_the_tokenizer_begins_with_is_not_scored_and_not_doubled():
    class Begins(Bigram):
        def encode(self, text):
            return [7, *super().encode(text)]

        def logits(self, tokens_BT):
            assert (tokens_BT[:, 0] == 7).all() and (tokens_BT[:, 1:] != END).any()
            return super().logits(tokens_BT)

    model = Begins()
    loss = -sum(Bigram().expected(text, 7)[0] for text in TEXTS)
    found = evaluate_text(model, TEXTS, LIMITS)
    assert found["tokens"] == sum(map(len, TEXTS))
    assert math.log(found["perplexity"]) == pytest.approx(loss / found["tokens"], rel=1e-6)


def test_tokenizers_that_can_not_be_scored_are_refused():
    class Ends(Uniform):
        def encode(self, text):
            return [*super().encode(text), END]

    class Numbers(Uniform):
        def encode(self, text):
            return [int(word) for word in text.split(" ")]

    with pytest.raises(ValueError, match="token 0 behind every text"):
        evaluate_text(Ends(), TEXTS, LIMITS)
    with pytest.raises(ValueError, match="does not encode text"):
        evaluate_text(Numbers(), TEXTS, LIMITS)


def test_standard_error_of_equally_long_documents_is_that_of_a_mean():
    losses_D = np.array([3.0, 5.0, 4.0, 9.0])
    value, stderr = ratio(losses_D, np.full(4, 2))
    assert value == 2.625 and stderr == pytest.approx(losses_D.std(ddof=1) / 2 / math.sqrt(4))


def test_standard_error_of_documents_of_different_length_is_what_samples_scatter_by():
    generator = np.random.default_rng(1)
    below_SD = generator.integers(1, 50, size=(4000, 60))
    above_SD = below_SD * 2.0 + generator.normal(size=below_SD.shape) * np.sqrt(below_SD)
    found = [ratio(above_D, below_D) for above_D, below_D in zip(above_SD, below_SD, strict=True)]
    scatter = np.std([value for value, _ in found])
    assert np.mean([stderr for _, stderr in found]) == pytest.approx(scatter, rel=0.05)  # 4,000 samples: 1.1 %


def test_one_document_has_no_standard_error():
    found = evaluate_text(Bigram(), TEXTS[:1], LIMITS)
    assert found["perplexity_stderr"] is None and found["bits_per_byte_stderr"] is None and found["perplexity"] > 1


def test_documents_of_a_file(tmp_path):
    file = tmp_path / "held.jsonl"
    file.write_text("".join(json.dumps({"body": text}) + "\n" for text in TEXTS))
    assert read_documents(str(file), "body", None) == TEXTS
    assert read_documents(str(file), "body", 2) == TEXTS[:2]
    with pytest.raises(ValueError, match=r"held.jsonl:1: .*text"):
        read_documents(str(file), "text", None)
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(ValueError, match="no text in it: give held-out text"):
        read_documents(str(tmp_path / "empty.jsonl"), "text", None)
    with pytest.raises(ValueError, match=r"--input .*nothing.txt: no such file"):
        read_documents(str(tmp_path / "nothing.txt"), "text", None)
