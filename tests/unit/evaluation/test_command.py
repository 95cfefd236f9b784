"""What users of tools/evaluate.py do wrong: exit code 2, the remedy, and no model is opened."""

import importlib.util
import json
import os

import pytest

from hmoe_megatron.tools import evaluate
from hmoe_megatron.tools.evaluation import work
from hmoe_megatron.tools.evaluation.inputs import Source
from tests.unit.evaluation.apart import in_another_process
from tests.unit.evaluation.stand_in import Uniform
from tests.unit.evaluation.tiny import write_benchmarks


@pytest.fixture
def folder(tmp_path):
    """Text, benchmarks, a run's directory and two of Hugging Face's, one with code."""
    (tmp_path / "held.txt").write_text("Some text.")
    write_benchmarks(tmp_path)
    for name in ("run", "empty", "stock", "code"):
        (tmp_path / name).mkdir()
    (tmp_path / "run/run_arguments.json").write_text("[]")
    (tmp_path / "stock/config.json").write_text(json.dumps({"model_type": "mixtral"}))
    (tmp_path / "code/config.json").write_text(json.dumps({"auto_map": {"AutoConfig": "configuration_x.X"}}))
    return tmp_path


@pytest.fixture
def refused(folder, monkeypatch, capsys):
    def opened(*_):
        raise AssertionError("a model was opened")

    monkeypatch.setattr(evaluate, "evaluate_apart", opened)

    def run(words):
        assert evaluate.main([word.replace("DIR", str(folder)) for word in words.split()]) == 2
        printed = capsys.readouterr()
        assert printed.out == "" and printed.err.startswith("evaluate.py: error: ") and printed.err.count("\n") == 1
        return printed.err.replace(str(folder), "DIR")

    return run


ALL = "--load DIR/run --benchmarks DIR"
TEXT = "--tasks none --input DIR/held.txt"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (TEXT, "0 models: give --load RUN ... or --hf DIR"),
        (f"--load DIR/none {TEXT}", "--load DIR/none: no such directory"),
        (f"--load DIR/run DIR/empty {TEXT}", "DIR/empty/run_arguments.json is missing: give the --save directory"),
        (f"--hf DIR/run {TEXT}", "--hf DIR/run: config.json can't be read"),
        (f"--hf DIR/code {TEXT}", "read its *.py files and give --trust-remote-code"),
        ("--load DIR/run", "--benchmarks DIR is missing: `python tools/get_corpus.py benchmarks-eval --output DIR`"),
        ("--load DIR/run --tasks none", "nothing is left to evaluate: give text with --input"),
        ("--load DIR/run --tasks none --input DIR/no.txt", "--input DIR/no.txt: no such file"),
        (f"{ALL} --tasks piqa,mmlu", "--tasks mmlu: no such benchmark; there are piqa, hellaswag"),
        (f"{ALL} --tasks piqa,piqa", "name each benchmark once"),
        (f"--load DIR/run {TEXT} --limit 0", "--limit 0: give at least 1"),
        (f"--load DIR/run {TEXT} --batch-tokens -3", "--batch-tokens -3: give at least 1"),
        (
            f"--load DIR/run {TEXT} --output DIR/held.txt/a.json",
            "--output DIR/held.txt/a.json: DIR/held.txt is no directory",
        ),
    ],
)
def test_wrong_flags_and_files(refused, words, said):
    assert said in refused(words)


@pytest.mark.parametrize("damage", ["missing", "altered", "unlisted"])
def test_benchmarks_that_are_not_as_they_were_fetched(refused, folder, monkeypatch, damage):
    monkeypatch.setattr(evaluate.benchmarks, "require_lm_eval", lambda: None)
    file, manifest = folder / "boolq.jsonl", folder / "benchmarks-eval.json"
    if damage == "missing":
        file.unlink()
    elif damage == "altered":
        file.write_text(file.read_text().replace("true", "false"))
    else:
        manifest.write_text(manifest.read_text().replace("boolq", "other"))
    said = refused(ALL)
    assert "boolq" in said and "python tools/get_corpus.py benchmarks-eval --output DIR" in said


def test_lm_eval_is_asked_for_only_where_it_is_needed(refused, folder, monkeypatch, capsys):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *_: None if name == "lm_eval" else find(name))
    assert "the benchmarks need lm-eval: pip install 'hmoe-megatron[eval]'" in refused(ALL)
    monkeypatch.setattr(evaluate, "evaluate_apart", lambda source, asked: work.evaluate(source, asked))
    monkeypatch.setattr("hmoe_megatron.tools.evaluation.models.open_model", lambda _: Uniform())
    assert evaluate.main(["--load", str(folder / "run"), "--tasks", "none", "--input", str(folder / "held.txt")]) == 0
    assert f"held.txt perplexity{Uniform.vocabulary:23.2f}" in capsys.readouterr().out


def test_code_that_the_user_trusts_is_not_refused(folder):
    Source("hf", str(folder / "code"), (), True).check()
    Source("hf", str(folder / "stock")).check()


@pytest.mark.parametrize("flag", ["context", "stride"])
def test_more_than_a_model_sees_is_refused(monkeypatch, flag):
    monkeypatch.setattr("hmoe_megatron.tools.evaluation.models.open_model", lambda _: Uniform())
    asked = work.Work({}, {"a": ["text"]}, **{flag: 513})
    with pytest.raises(ValueError, match=f"--load runs/a: --{flag} 513: it sees 512 tokens: give at most that"):
        work.evaluate(Source("load", "runs/a"), asked)
    assert work.evaluate(Source("load", "runs/a"), work.Work({}, {"a": ["text"]}, **{flag: 512}))["texts"]
    with pytest.raises(ValueError, match="--stride 9: it sees 8 tokens"):
        work.evaluate(Source("load", "runs/a"), work.Work({}, {"a": ["text"]}, context=8, stride=9))


def test_a_model_has_a_process_of_its_own_without_a_network(monkeypatch):
    monkeypatch.setattr(work, "evaluate", in_another_process)
    found = work.evaluate_apart(Source("hf", "works"), None)
    assert found["offline"] == "1" and found["process"] != os.getpid()
    with pytest.raises(ValueError, match="this model is refused"):
        work.evaluate_apart(Source("hf", "refused"), None)
    with pytest.raises(ValueError, match="--hf dies: its process died, .*: give fewer --batch-tokens"):
        work.evaluate_apart(Source("hf", "dies"), None)


@pytest.mark.campaign  # 10 s for the imports of transformers
def test_a_model_that_does_not_load_is_an_error_of_its_own_process(folder, capsys):
    pytest.importorskip("transformers", reason="transformers is not installed: pip install 'hmoe-megatron[hf]'")
    assert evaluate.main(["--hf", str(folder / "stock"), "--tasks", "none", "--input", str(folder / "held.txt")]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.splitlines()[-1].startswith(f"evaluate.py: error: --hf {folder}/stock: ")


@pytest.mark.campaign  # 10 s for Megatron's imports
def test_a_run_without_a_checkpoint(folder, capsys):
    flags = (
        "--num-layers 1 --hidden-size 8 --num-attention-heads 1 --seq-length 8 --max-position-embeddings 8 --swiglu "
        "--position-embedding-type rope --disable-bias-linear --normalization RMSNorm --num-experts 2 --lr 1 "
        "--tokenizer-type NullTokenizer --vocab-size 9 --hmoe-widths equal --hmoe-total-width 32 --mock-data"
    )
    (folder / "run/run_arguments.json").write_text(json.dumps(flags.split()))
    assert evaluate.main(["--load", str(folder / "run"), "--tasks", "none", "--input", str(folder / "held.txt")]) == 2
    assert f"evaluate.py: error: --load {folder}/run: " in capsys.readouterr().err.splitlines()[-1]
