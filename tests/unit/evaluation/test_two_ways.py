"""A real checkpoint, and the same weights as a Hugging Face directory, through the tool as a user runs it."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hmoe_megatron.evaluation.benchmarks import BENCHMARKS, read_rows
from tests.distributed.ranks import run_ranks
from tests.unit.evaluation import mixtral
from tests.unit.evaluation.tiny import SENTENCES, VOCABULARY, train, write_benchmarks, write_tokenizer

pytest.importorskip("transformers", reason="transformers is not installed: pip install 'hmoe-megatron[hf]'")
ROOT = Path(__file__).parents[3]
QUESTIONS = 5
# Of sums of up to 60 log-probabilities in float32, computed in another order; 2.4e-6 was seen.
SAME = 1e-5
WITH_LM_EVAL = pytest.mark.skipif(not importlib.util.find_spec("lm_eval"),
                                  reason="lm-eval is not installed: pip install 'hmoe-megatron[eval]'")  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(folder of all files, what `mixtral.save` returned)."""
    folder = tmp_path_factory.mktemp("evaluated")
    write_benchmarks(folder)
    lines = [json.dumps({"text": text}) for text in SENTENCES]
    (folder / "held.jsonl").write_text("\n".join(lines))
    tokenizer = write_tokenizer(folder / "tokenizer")
    run = train(folder / "run", tokenizer, 1)
    (compared,) = run_ranks(1, mixtral.save, run, tokenizer, folder / "hf")
    return folder, compared


@pytest.fixture(scope="module")
def folder(made):
    return made[0]


@pytest.fixture(scope="module")
def evaluated(folder):
    """(what the tool printed, its JSON)."""
    tasks = ["--benchmarks", folder] if importlib.util.find_spec("lm_eval") else ["--tasks", "none"]
    words = ["--load", folder / "run", "--hf", folder / "hf", *tasks, "--input", folder / "held.jsonl", "--limit",
             QUESTIONS, "--per-question", "--output", folder / "out.json"]  # fmt: skip
    done = subprocess.run([sys.executable, "tools/evaluate.py", *map(str, words)], cwd=ROOT, capture_output=True,
                          text=True, timeout=300)  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout, json.loads((folder / "out.json").read_text())


def test_tokens_and_logits_are_equal(made):
    _, compared = made
    assert len(compared) == len(SENTENCES)
    for tokens, their_tokens, logits, their_logits in compared:
        assert tokens == their_tokens and logits.shape == (1, len(tokens), VOCABULARY)
        assert logits.std() > 0.1
        torch.testing.assert_close(logits, their_logits, rtol=0, atol=SAME)


def test_text_is_equally_likely_in_both(evaluated):
    _, results = evaluated
    ours, theirs = (model["texts"] for model in results["models"])
    ((path, ours), (_, theirs)) = *ours.items(), *theirs.items()
    assert path.endswith("held.jsonl") and ours["documents"] == len(SENTENCES)
    assert (ours["tokens"], ours["bytes"]) == (theirs["tokens"], theirs["bytes"])
    assert ours["bytes"] == sum(len(text) for text in SENTENCES)
    for name in ("perplexity", "bits_per_byte", "bits_per_byte_stderr"):
        assert ours[name] == pytest.approx(theirs[name], rel=SAME)


def test_what_is_told_of_the_models(evaluated):
    printed, results = evaluated
    ours, theirs = results["models"]
    assert (ours["kind"], ours["iteration"], ours["context"]) == ("load", 3, 64)
    assert (theirs["kind"], theirs["model_type"], theirs["context"]) == ("hf", "mixtral", 64)
    assert ours["vocabulary"] == theirs["vocabulary"] and ours["dtype"] == theirs["dtype"] == "float32"
    assert results["schema"] == 1 and results["limit"] == QUESTIONS
    assert "held.jsonl perplexity" in printed and max(map(len, printed.splitlines())) <= 100


@WITH_LM_EVAL
def test_every_question_is_answered_alike(evaluated):
    printed, results = evaluated
    ours, theirs = results["models"]
    assert list(ours["tasks"]) == list(theirs["tasks"]) == list(BENCHMARKS)
    for name, task in ours["tasks"].items():
        assert task["questions"] == QUESTIONS == len(task["log_likelihoods"])
        for mine, its in zip(task["log_likelihoods"], theirs["tasks"][name]["log_likelihoods"], strict=True):
            assert mine == pytest.approx(its, abs=SAME, rel=SAME) and len(set(mine)) > 1
        assert task["acc"] == theirs["tasks"][name]["acc"]
    assert theirs["against_first"]["answered_differently"] == theirs["against_first"]["choices_apart"] == 0
    assert f"B against A: 0 of {6 * QUESTIONS} questions answered otherwise" in printed


@WITH_LM_EVAL
def test_lm_evals_own_model_of_the_directory_agrees(folder, evaluated):
    from hmoe_megatron.evaluation.harness import load_tasks

    huggingface = pytest.importorskip("lm_eval.models.huggingface", reason="lm-eval's hf extra is not installed")
    import lm_eval

    _, results = evaluated
    tasks = load_tasks({name: read_rows(folder, name) for name in BENCHMARKS})
    stock = huggingface.HFLM(pretrained=str(folder / "hf"), device="cpu", dtype="float32", batch_size=4)
    found = lm_eval.evaluate(stock, tasks, limit=QUESTIONS)
    for name, benchmark in BENCHMARKS.items():
        ours = results["models"][1]["tasks"][name]
        assert found["results"][benchmark.task]["acc,none"] == ours["acc"]
        for sample in found["samples"][benchmark.task]:
            values = [choice[0] for choice in sample["filtered_resps"]]
            assert values == pytest.approx(ours["log_likelihoods"][sample["doc_id"]], abs=SAME, rel=SAME)
