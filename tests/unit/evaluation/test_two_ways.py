"""A real checkpoint, and its exports, stock Mixtral and our own, through the tools as a user runs them."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hmoe_megatron.evaluation.benchmarks import BENCHMARKS, read_rows
from tests.unit.evaluation.tiny import SENTENCES, train, write_benchmarks, write_tokenizer
from tests.unit.hf.conversions import to_hf

pytest.importorskip("transformers", reason="transformers is not installed: pip install 'hmoe-megatron[hf]'")
ROOT = Path(__file__).parents[3]
QUESTIONS = 5
# Of sums of up to 60 log-probabilities in float32, computed in another order; 2.4e-6 was seen.
SAME = 1e-5
WITH_LM_EVAL = pytest.mark.skipif(not importlib.util.find_spec("lm_eval"),
                                  reason="lm-eval is not installed: pip install 'hmoe-megatron[eval]'")  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluated")
    write_benchmarks(folder)
    lines = [json.dumps({"text": text}) for text in SENTENCES]
    (folder / "held.jsonl").write_text("\n".join(lines))
    run = train(folder / "run", write_tokenizer(folder / "tokenizer"), 1)
    assert to_hf(run, folder / "padded", "--padded", "mixtral", "--no-logits") == 0
    assert to_hf(run, folder / "own", "--text", str(folder / "held.jsonl")) == 0
    return folder


@pytest.fixture(scope="module")
def evaluated(folder):
    """(what the tool printed, its JSON)."""
    tasks = ["--benchmarks", folder] if importlib.util.find_spec("lm_eval") else ["--tasks", "none"]
    words = ["--load", folder / "run", "--hf", folder / "padded", folder / "own",
             "--trust-remote-code", *tasks, "--input", folder / "held.jsonl",
             "--limit", QUESTIONS, "--per-question", "--output", folder / "out.json"]  # fmt: skip
    done = subprocess.run([sys.executable, "tools/evaluate.py", *map(str, words)], cwd=ROOT, capture_output=True,
                          text=True, timeout=300)  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout, json.loads((folder / "out.json").read_text())


def test_text_is_equally_likely_in_both(evaluated):
    _, results = evaluated
    ((path, ours),) = results["models"][0]["texts"].items()
    assert path.endswith("held.jsonl") and ours["documents"] == len(SENTENCES)
    assert ours["bytes"] == sum(len(text) for text in SENTENCES)
    for model in results["models"][1:]:
        theirs = model["texts"][path]
        assert (ours["tokens"], ours["bytes"]) == (theirs["tokens"], theirs["bytes"])
        for name in ("perplexity", "bits_per_byte", "bits_per_byte_stderr"):
            assert ours[name] == pytest.approx(theirs[name], rel=SAME)


def test_what_is_told_of_the_models(evaluated):
    printed, results = evaluated
    ours, theirs, own = results["models"]
    assert own["model_type"] == "hmoe" and own["parameters"] < theirs["parameters"]
    assert (ours["kind"], ours["iteration"], ours["context"]) == ("load", 3, 64)
    assert (theirs["kind"], theirs["model_type"], theirs["context"]) == ("hf", "mixtral", 64)
    assert ours["vocabulary"] == theirs["vocabulary"] and ours["dtype"] == theirs["dtype"] == "float32"
    assert results["schema"] == 1 and results["limit"] == QUESTIONS
    assert "held.jsonl perplexity" in printed and max(map(len, printed.splitlines())) <= 100


@WITH_LM_EVAL
def test_every_question_is_answered_alike(evaluated):
    printed, results = evaluated
    ours, *others = results["models"]
    for name, theirs in zip("BC", others, strict=True):
        assert list(ours["tasks"]) == list(theirs["tasks"]) == list(BENCHMARKS)
        for key, task in ours["tasks"].items():
            assert task["questions"] == QUESTIONS == len(task["log_likelihoods"])
            for mine, its in zip(task["log_likelihoods"], theirs["tasks"][key]["log_likelihoods"], strict=True):
                assert mine == pytest.approx(its, abs=SAME, rel=SAME) and len(set(mine)) > 1
            assert task["acc"] == theirs["tasks"][key]["acc"]
        assert theirs["against_first"]["answered_differently"] == theirs["against_first"]["choices_apart"] == 0
        assert f"{name} against A: 0 of {6 * QUESTIONS} questions answered otherwise" in printed


@WITH_LM_EVAL
def test_lm_evals_own_model_of_the_directory_agrees(folder, evaluated):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from hmoe_megatron.evaluation.harness import load_tasks

    huggingface = pytest.importorskip("lm_eval.models.huggingface", reason="lm-eval's hf extra is not installed")
    import lm_eval

    _, results = evaluated
    model = AutoModelForCausalLM.from_pretrained(folder / "padded", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder / "padded")
    model.resize_token_embeddings(len(tokenizer))  # it counts rows that pad the vocabulary; here they have no part
    tasks = load_tasks({name: read_rows(folder, name) for name in BENCHMARKS})
    stock = huggingface.HFLM(pretrained=model.eval(), tokenizer=tokenizer, batch_size=4)
    found = lm_eval.evaluate(stock, tasks, limit=QUESTIONS)
    for name, benchmark in BENCHMARKS.items():
        ours = results["models"][1]["tasks"][name]
        assert found["results"][benchmark.task]["acc,none"] == ours["acc"]
        for sample in found["samples"][benchmark.task]:
            values = [choice[0] for choice in sample["filtered_resps"]]
            assert values == pytest.approx(ours["log_likelihoods"][sample["doc_id"]], abs=SAME, rel=SAME)


@pytest.mark.parametrize("flags", [("--temperature", "0"), ("--top-k", "40", "--top-p", "0.9", "--seed", "3")])
def test_both_write_the_same_text(folder, flags):
    """With keys and values kept and without, until the context of 64 tokens is passed."""
    texts = []
    for model in (("--load", folder / "run"), ("--hf", folder / "own", "--trust-remote-code")):
        words = [*model, "--prompt", SENTENCES[0], "--tokens", 80, "--ignore-eod", *flags]
        done = subprocess.run([sys.executable, "tools/generate.py", *map(str, words)], cwd=ROOT, capture_output=True,
                              text=True, timeout=300)  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
        assert done.stdout.startswith(SENTENCES[0]) and "80 tokens in" in done.stderr
        texts.append(done.stdout)
    assert texts[0] == texts[1]
