"""A real checkpoint, and its exports, stock Mixtral and our own, through both tools in one process."""

import importlib.util
import json

import pytest
import torch

from hmoe_megatron.tools.evaluation.benchmarks import BENCHMARKS, read_rows
from tests.distributed.ranks import run_ranks
from tests.unit.evaluation.tiny import SENTENCES, train, use_tools, write_benchmarks, write_tokenizer
from tests.unit.hf.conversions import to_hf

pytest.importorskip("transformers", reason="transformers is not installed: pip install 'hmoe-megatron[hf]'")
QUESTIONS = 5
# Of sums of up to 60 log-probabilities in float32, computed in another order; 2.4e-6 was seen.
SAME = 1e-5
HAS_LM_EVAL = importlib.util.find_spec("lm_eval") is not None
WITH_LM_EVAL = pytest.mark.skipif(not HAS_LM_EVAL, reason="lm-eval is not installed: pip install 'hmoe-megatron[eval]'")
DRAWS = (("--temperature", "0"), ("--top-k", "40", "--top-p", "0.9", "--seed", "3"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluated")
    write_benchmarks(folder)
    (folder / "held.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in SENTENCES))
    run = train(folder / "run", write_tokenizer(folder / "tokenizer"), 1)
    assert to_hf(run, folder / "padded", "--padded", "mixtral", "--no-logits") == 0
    assert to_hf(run, folder / "own", "--no-logits") == 0
    return folder


@pytest.fixture(scope="module")
def printed(folder):
    """What tools/evaluate.py printed, and then tools/generate.py of each of DRAWS and both models."""
    tasks = ("--benchmarks", folder) if HAS_LM_EVAL else ("--tasks", "none")
    run, own = ("--load", folder / "run"), ("--hf", folder / "own", "--trust-remote-code")
    evaluate = (
        *run,
        "--hf",
        folder / "padded",
        folder / "own",
        "--trust-remote-code",
        *tasks,
        "--limit",
        QUESTIONS,
        "--input",
        folder / "held.jsonl",
        "--per-question",
        "--output",
        folder / "out.json",
    )
    words = ("--prompt", SENTENCES[0], "--tokens", 80, "--ignore-eod")
    draws = [(*model, *words, *flags) for flags in DRAWS for model in (run, own)]
    (found,) = run_ranks(1, use_tools, evaluate, draws, timeout_s=240)
    return found


@pytest.fixture(scope="module")
def evaluated(folder, printed):
    """(what the tool printed, its JSON)."""
    return printed[0], json.loads((folder / "out.json").read_text())


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

    from hmoe_megatron.tools.evaluation.harness import load_tasks

    huggingface = pytest.importorskip("lm_eval.models.huggingface", reason="lm-eval's hf extra is not installed")
    import lm_eval

    _, results = evaluated
    model = AutoModelForCausalLM.from_pretrained(folder / "padded", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder / "padded")
    model.resize_token_embeddings(len(tokenizer))  # it counts rows that pad the vocabulary; here they have no part
    tasks = load_tasks({name: read_rows(folder, name) for name in BENCHMARKS})
    stock = huggingface.HFLM(pretrained=model.eval(), tokenizer=tokenizer, batch_size=4)
    found = lm_eval.evaluate(stock, tasks, limit=QUESTIONS)
    for name, (its_name, _) in BENCHMARKS.items():
        ours = results["models"][1]["tasks"][name]
        assert found["results"][its_name]["acc,none"] == ours["acc"]
        for sample in found["samples"][its_name]:
            values = [choice[0] for choice in sample["filtered_resps"]]
            assert values == pytest.approx(ours["log_likelihoods"][sample["doc_id"]], abs=SAME, rel=SAME)


@pytest.mark.parametrize("at", range(len(DRAWS)))
def test_both_write_the_same_text(printed, at):
    """With keys and values kept and without, until the context of 64 tokens is passed."""
    ours, theirs = printed[1 + 2 * at : 3 + 2 * at]
    assert ours == theirs and ours.startswith(SENTENCES[0]) and len(ours) > len(SENTENCES[0]) + 40
