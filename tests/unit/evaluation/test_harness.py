"""lm-eval's prompts on our files, and what it makes of a model whose log-likelihoods are known."""

import json
import socket
from pathlib import Path

import pytest

from hmoe_megatron.tools.evaluation.benchmarks import BENCHMARKS, read_rows
from hmoe_megatron.tools.evaluation.inputs import go_offline
from hmoe_megatron.tools.evaluation.scoring import Limits
from tests.unit.evaluation.stand_in import Bigram
from tests.unit.evaluation.tiny import ROWS, WORDS, write_benchmarks

go_offline()
lm_eval = pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install 'hmoe-megatron[eval]'")
from hmoe_megatron.tools.evaluation.harness import evaluate_tasks, load_tasks  # noqa: E402

LIMITS = Limits(512)
FLOAT32 = 1e-5
# (context, [choices], index of the right one) of the first question of each, as lm-eval 0.4.13 words them.
QUESTIONS = {
    "piqa": ("Question: dry a wet coat\nAnswer:", [" hang it in the sun", " put it in a bucket"], 0),
    "hellaswag": (
        "Cooking: A coat is on the stove. The cook",
        [" swims.", " falls. asleep.", " takes it off.", " reads."],
        2,
    ),
    "boolq": ("Water boils at a hundred degrees.\nQuestion: does coat boil?\nAnswer:", [" no", " yes"], 1),
    "siqa": ("Q: Ann gave the coat away. How does she feel?\nA:", [" kind", " red", " wet"], 0),
    "arc_easy": ("Question: Which coat is warm?\nAnswer:", [" ice", " fire", " snow"], 1),
}
WINOGRANDE = ["The coat did not fit the box because the trophy", "The coat did not fit the box because the box"]


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    folder = write_benchmarks(tmp_path_factory.mktemp("benchmarks"))
    return {name: read_rows(folder, name) for name in BENCHMARKS}


@pytest.fixture(scope="module")
def tasks(rows):
    return load_tasks(rows)["tasks"]


def requests(tasks, name):
    task = tasks[BENCHMARKS[name][0]]
    task.build_all_requests(limit=1)
    return task, [instance.args for instance in task.instances]


@pytest.mark.parametrize("name", QUESTIONS)
def test_prompts_and_answers_are_lm_evals(tasks, name):
    context, choices, right = QUESTIONS[name]
    task, found = requests(tasks, name)
    assert found == [(context, choice) for choice in choices]
    assert task.doc_to_target(next(iter(task.validation_docs()))) == right


def test_winogrande_scores_the_same_ending_after_both_beginnings(tasks):
    task, found = requests(tasks, "winogrande")
    assert found == [(beginning, " was too big.") for beginning in WINOGRANDE]
    assert task.doc_to_text(next(iter(task.validation_docs()))) == 0


def test_tasks_are_lm_evals_own_files(tasks):
    own = Path(lm_eval.__file__).parent / "tasks"
    for task in tasks.values():
        assert Path(task.config.metadata["config_source"]).is_relative_to(own)


def likeliest(model, context, choices):
    values = [model.expected(choice, model.encode(context)[-1])[0] for choice in choices]
    lengths = [len(choice) - 1 for choice in choices]
    normalised = [value / length for value, length in zip(values, lengths, strict=True)]
    return values, values.index(max(values)), normalised.index(max(normalised))


@pytest.mark.parametrize("seed", [0, 1])
def test_accuracies_and_log_likelihoods_by_hand(rows, seed):
    model = Bigram(seed)
    found = evaluate_tasks(model, rows, LIMITS, 1)
    for name, (context, choices, right) in QUESTIONS.items():
        values, best, normalised = likeliest(model, context, choices)
        assert found[name]["log_likelihoods"] == [pytest.approx(values, rel=FLOAT32)]
        assert found[name]["acc"] == (best == right) and found[name]["questions"] == 1
        assert found[name]["acc_stderr"] is None
        if "acc_norm" in found[name]:
            assert found[name]["acc_norm"] == (normalised == right)
    assert [name for name in found if "acc_norm" in found[name]] == ["piqa", "hellaswag", "arc_easy"]
    endings = [model.expected(" was too big.", model.encode(text)[-1])[0] for text in WINOGRANDE]
    assert found["winogrande"]["log_likelihoods"] == [pytest.approx(endings, rel=FLOAT32)]
    assert found["winogrande"]["acc"] == (endings[0] > endings[1])


def test_all_questions_in_their_order_and_the_standard_error(tmp_path):
    folder = write_benchmarks(tmp_path, ["arc_easy"])
    file = folder / "arc_easy.jsonl"
    changed = [
        json.loads(line) | {"answerKey": key} for line, key in zip(file.read_text().splitlines(), "ABCABC", strict=True)
    ]
    model = Bigram()
    found = evaluate_tasks(model, {"arc_easy": changed}, LIMITS)["arc_easy"]
    contexts = [QUESTIONS["arc_easy"][0].replace("coat", word) for word in WORDS]
    assert found["log_likelihoods"] == [
        pytest.approx(likeliest(model, context, [" ice", " fire", " snow"])[0], rel=FLOAT32) for context in contexts
    ]
    assert found["acc"] == pytest.approx(1 / 3), "the answer is the same for all: right for two of six"
    assert found["acc_stderr"] == pytest.approx((1 / 3 * 2 / 3 / 5) ** 0.5)


def test_no_network_is_asked(rows, monkeypatch):
    def refuse(*_):
        raise AssertionError("a connection was tried")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    assert evaluate_tasks(Bigram(), rows, LIMITS, 2)["boolq"]["questions"] == 2


def test_a_choice_without_a_token_of_its_own_is_refused(rows):
    class Swallows(Bigram):
        def encode(self, text):
            return super().encode(text.removesuffix(" no"))

    with pytest.raises(ValueError, match="leaves no token of ' no' after"):
        evaluate_tasks(Swallows(), {"boolq": rows["boolq"]}, LIMITS, 1)


def test_rows_name_all_benchmarks():
    assert set(ROWS) == set(BENCHMARKS) == {*QUESTIONS, "winogrande"}
