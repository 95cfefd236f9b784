"""What two results differ by, and the table."""

import math

import pytest

from hmoe_megatron.tools.evaluation.report import WIDTH, difference, mean_accuracy, table


def result(path="runs/a", shift=0.0, swap=False, **more):
    choices = [[-1.0, -2.0 + shift], [-5.0, -3.0]]
    task = {
        "questions": 2,
        "acc": 0.5,
        "acc_stderr": 0.03,
        "acc_norm": 0.25,
        "acc_norm_stderr": 0.02,
        "log_likelihoods": [choices[0][::-1], choices[1]] if swap else choices,
    }
    other = task | {"acc": 0.7, "acc_stderr": 0.04}
    del other["acc_norm"], other["acc_norm_stderr"]
    text = {
        "documents": 3,
        "tokens": 10,
        "bytes": 40,
        "perplexity": 12.5,
        "perplexity_stderr": 0.5,
        "bits_per_byte": 1.23456,
        "bits_per_byte_stderr": None,
    }
    return {
        "kind": "load",
        "path": path,
        "context": 64,
        "vocabulary": 100,
        "iteration": 3,
        "parameters": 9_400_000,
        "dtype": "float32",
        "tasks": {"piqa": task, "boolq": other},
        "texts": {"corpora/held.jsonl": text},
        "against_first": None,
    } | more


def test_differences_count_answers_and_measure_log_likelihoods():
    assert difference(result(), result()) == {
        "questions": 4,
        "answered_differently": 0,
        "choices": 8,
        "choices_apart": 0,
        "largest_difference": 0.0,
    }
    moved = difference(result(), result(shift=0.5))
    assert (moved["largest_difference"], moved["choices_apart"], moved["answered_differently"]) == (0.5, 2, 0)
    assert difference(result(), result(swap=True))["answered_differently"] == 2
    assert difference(result(tasks={}), result(tasks={})) is None


def test_mean_accuracy_and_its_standard_error():
    mean, stderr = mean_accuracy(result()["tasks"])
    assert mean == pytest.approx(0.6) and stderr == pytest.approx(0.05 / 2)
    tasks = result()["tasks"]
    tasks["piqa"]["acc_stderr"] = None
    assert mean_accuracy(tasks)[1] is None


def test_rows_of_the_table():
    lines = table([result()]).splitlines()
    assert {line[:24].strip(): line[24:].strip() for line in lines[1:7]} == {
        "piqa acc": "50.00 ± 3.00",
        "piqa acc_norm": "25.00 ± 2.00",
        "boolq acc": "70.00 ± 4.00",
        "mean acc": "60.00 ± 2.50",
        "held.jsonl perplexity": "12.50 ± 0.50",
        "held.jsonl bits per byte": "1.2346",
    }
    assert lines[-1] == "A  runs/a, iteration 3: 9.4 M parameters, float32, context 64"


def test_models_stand_beside_each_other_within_the_width():
    first = result()
    others = [result(f"runs/{'long ' * 40}{i}", swap=i == 3) for i in range(8)]
    results = [first, *(other | {"against_first": difference(first, other)} for other in others)]
    lines = table(results).splitlines()
    assert max(map(len, lines)) <= WIDTH
    assert sum(line.startswith("piqa acc ") for line in lines) == 3, "four models in a block"
    (line,) = [number for number, line in enumerate(lines) if line.startswith("E against A")]
    assert lines[line] == "E against A: 2 of 4 questions answered otherwise,"
    assert lines[line + 1].strip() == "4 of 8 log-likelihoods more than 0.0001 apart, the most 1"
    assert sum("…" in line for line in lines) == len(others)
    for letter in "ABCDEFGHI":
        assert sum(letter in line.split() for line in lines[:-25]) == 1


def test_a_text_alone_has_no_mean():
    shown = table([result(tasks={}), result(tasks={})])
    assert "mean" not in shown and "against" not in shown and "perplexity" in shown


def test_texts_of_one_name_have_rows_of_their_own():
    text = result()["texts"]["corpora/held.jsonl"]
    shown = table([result(texts={"a/held.txt": text, "b/held.txt": text | {"perplexity": 99.0}, "c.txt": text})])
    labels = [line[:24].strip() for line in shown.splitlines() if "perplexity" in line]
    assert labels == ["a/held.txt perplexity", "b/held.txt perplexity", "c.txt perplexity"]


def test_no_standard_error_is_written_that_is_not_known():
    task = result()["tasks"]["piqa"] | {"acc_stderr": math.nan, "acc_norm_stderr": None}
    shown = table([result(tasks={"piqa": task})])
    assert "nan" not in shown.lower() and "None" not in shown
