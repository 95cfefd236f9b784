"""Checkpoints of any layout become a Hugging Face directory that computes the same, or nothing."""

import json
import multiprocessing
import os
import shutil
import signal
import weakref

import pytest
import sentencepiece
import torch

from hmoe_megatron.hf.checkpoint_tensors import CheckpointTensors
from tests.rows import mostly_rarely
from tests.unit.hf.conversions import TIED, convert_checkpoint, from_hf, tensors_of, to_hf, train

KINDS = {
    "expert parallel, with cuts": (2, "--expert-model-parallel-size 2 --hmoe-widths 16,32,48,160"),
    "tensor parallel": (2, "--tensor-model-parallel-size 2 --sequence-parallel"),
    "pipeline, grouped queries": (2, "--pipeline-model-parallel-size 2 --group-query-attention --num-query-groups 2"),
    "top-p, with norms and biases": (1, "--hmoe-router topp --hmoe-top-p 0.6 --qk-layernorm --add-qkv-bias"),
    "a dense layer, pre-softmax": (1, "--moe-layer-freq [0,1] --ffn-hidden-size 80 --moe-router-pre-softmax"),
    "bf16": (1, "--bf16 --moe-router-dtype fp32"),
    "tied embeddings, pipeline": (2, f"{TIED} --pipeline-model-parallel-size 2"),
    "four ranks of experts": (4, "--expert-model-parallel-size 4"),
}
IN_SUITE = ("expert parallel, with cuts", "top-p, with norms and biases", "tied embeddings, pipeline")


@pytest.fixture(scope="module", params=mostly_rarely(KINDS, IN_SUITE))
def run(request, tmp_path_factory):
    ranks, flags = KINDS[request.param]
    return train(tmp_path_factory.mktemp("run"), ranks, flags)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return train(tmp_path_factory.mktemp("small"), 1, "")


def test_the_export_computes_what_megatron_computes(run, tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text("any")  # the run has no tokenizer: random ids
    assert to_hf(run, tmp_path / "out", "--text", str(text)) == 0
    said = capsys.readouterr().out
    assert "logits of Megatron and transformers, fp32, 16 tokens: at most" in said
    told = json.loads((tmp_path / "out/hmoe_export.json").read_text())
    assert told["logits"]["largest_difference"] <= 1e-5 < told["logits"]["largest_logit"]
    found, index = tensors_of(tmp_path / "out"), json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    assert found.keys() == index["weight_map"].keys()
    assert sum(tensor.nbytes for tensor in found.values()) == index["metadata"]["total_size"]
    stored = CheckpointTensors(run)
    assert told["tensors"].keys() == found.keys()
    sizes = sum(torch.Size(shape).numel() for shape in stored.shapes.values())
    assert sum(tensor.numel() for tensor in found.values()) == sizes  # every value once, none lost


@pytest.mark.campaign
def test_each_model_is_in_a_process_of_its_own(small, tmp_path, capsys):
    (tmp_path / "text.txt").write_text("any")
    assert to_hf(small, tmp_path / "out", "--text", str(tmp_path / "text.txt")) == 0
    assert "logits of Megatron and transformers, fp32, 16 tokens: at most" in capsys.readouterr().out


def test_experts_keep_their_numbers_and_halves(small, tmp_path):
    assert to_hf(small, tmp_path / "out", "--no-logits") == 0
    found = tensors_of(tmp_path / "out")
    for expert, width in enumerate((16, 32, 48, 64)):
        key, name = f"decoder.layers.1.mlp.experts.{expert}", f"model.layers.1.mlp.experts.{expert}"
        source = CheckpointTensors(small).read([f"{key}.linear_fc1.weight", f"{key}.linear_fc2.weight"])
        gate, up = source[f"{key}.linear_fc1.weight"]
        assert torch.equal(found[f"{name}.gate_proj.weight"], gate) and gate.shape == (width, 32)
        assert torch.equal(found[f"{name}.up_proj.weight"], up)
        assert torch.equal(found[f"{name}.down_proj.weight"], source[f"{key}.linear_fc2.weight"])
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["expert_widths"] == [[16, 32, 48, 64]] * 2 and config["num_experts_per_tok"] == 2


def test_a_block_is_let_go_before_the_next_is_read(small, tmp_path, monkeypatch):
    """So that memory does not grow with the number of layers."""
    stock, held, blocks = CheckpointTensors.read, [], []

    def read(self, keys):
        assert [tensor for tensor in held if tensor() is not None] == []
        tensors = stock(self, keys)
        held.extend(map(weakref.ref, tensors.values()))
        blocks.append(keys)
        return tensors

    monkeypatch.setattr(CheckpointTensors, "read", read)
    assert to_hf(small, tmp_path / "out", "--no-logits") == 0
    assert len(blocks) == 4  # the embedding, two layers, the head


def test_two_exports_are_the_same_to_the_byte(small, tmp_path):
    for name in ("a", "b"):
        assert to_hf(small, tmp_path / name, "--no-logits") == 0
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes(), path.name


@pytest.mark.parametrize("at", [0, 2, "config", "rename"])
def test_killed_in_the_middle_leaves_nothing_that_looks_whole(small, tmp_path, at):
    """at: after how many files of weights, or before which operation."""

    def die(*given, **named):
        os.kill(os.getpid(), signal.SIGKILL)

    def convert():
        place, name = {"config": (export, "write_json"), "rename": (os, "rename")}.get(at, (shards, "save_file"))
        stock, calls = getattr(place, name), iter(range(100))
        setattr(
            place, name, lambda *given: die() if next(calls) == (at if isinstance(at, int) else 0) else stock(*given)
        )
        to_hf(small, tmp_path / "out", "--no-logits")

    from hmoe_megatron.hf import export, shards

    child = multiprocessing.get_context("fork").Process(target=convert)
    child.start()
    child.join(60)
    assert child.exitcode == -signal.SIGKILL
    assert [path.name for path in tmp_path.iterdir()] == [".out.writing"]
    assert to_hf(small, tmp_path / "out", "--no-logits") == 0  # the same command again
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_with_its_tokenizer_it_writes_text_and_comes_back(tmp_path, capsys):
    """A SentencePiece tokenizer; the text of both models' generation is that of the checkpoint's tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    prefix = tmp_path / "tok"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["the expert of unequal width"] * 50),
        model_prefix=str(prefix),
        vocab_size=100,
        model_type="bpe",
        hard_vocab_limit=False,
        minloglevel=2,
    )
    flags = f"--tokenizer-type SentencePieceTokenizer --tokenizer-model {prefix}.model"
    run, text = train(tmp_path / "run", 1, flags), tmp_path / "text.txt"
    text.write_text("the width of the expert " * 20)
    assert to_hf(run, tmp_path / "out", "--text", str(text)) == 0, capsys.readouterr().err
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    ids = model.generate(**tokenizer("the", return_tensors="pt"), max_new_tokens=8, do_sample=True)
    assert ids.max() < len(tokenizer) < model.config.vocab_size  # rows that pad the vocabulary are not drawn
    assert model.generation_config.eos_token_id == model.config.eos_token_id == tokenizer.eos_token_id
    (tmp_path / "tok.model").rename(tmp_path / "moved.model")  # the directory needs nothing of the run
    assert to_hf(run, tmp_path / "lost", "--no-logits") == 2
    assert "give the place where it is as --tokenizer-model" in capsys.readouterr().err
    moved = ("--tokenizer-model", str(tmp_path / "moved.model"), "--text", str(text))
    assert to_hf(run, tmp_path / "found", *moved) == 0, capsys.readouterr().err
    back = from_hf(tmp_path / "out", tmp_path / "back")
    assert back.returncode == 0, back.stderr[-3000:]
    assert to_hf(tmp_path / "back", tmp_path / "again", "--text", str(text)) == 0, capsys.readouterr().err
    for name in ("config.json", "tokenizer.json", "generation_config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "out" / name).read_bytes(), name


def test_bf16_rounds_each_weight(small, tmp_path):
    for dtype in ("fp32", "bf16"):
        assert to_hf(small, tmp_path / dtype, "--no-logits", "--dtype", dtype) == 0
    whole, rounded = tensors_of(tmp_path / "fp32"), tensors_of(tmp_path / "bf16")
    assert all(torch.equal(whole[name].bfloat16(), rounded[name]) for name in whole)
    assert json.loads((tmp_path / "bf16/config.json").read_text())["dtype"] == "bfloat16"


def test_a_checkpoint_with_a_missing_expert_is_refused(small, tmp_path, capsys, monkeypatch):
    kinds = CheckpointTensors.__init__

    def without_one(self, *args, **named):
        kinds(self, *args, **named)
        del self._kinds["decoder.layers.0.mlp.experts.2.linear_fc2.weight"]
        self._kinds["decoder.layers.0.mlp.experts.4.linear_fc2.weight"] = next(iter(self._kinds.values()))

    monkeypatch.setattr(CheckpointTensors, "__init__", without_one)
    assert to_hf(small, tmp_path / "out", "--no-logits") == 2
    said = capsys.readouterr().err
    assert "1 missing: decoder.layers.0.mlp.experts.2.linear_fc2.weight" in said
    assert "no place for: decoder.layers.0.mlp.experts.4.linear_fc2.weight" in said
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_checkpoint_is_refused(small, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(small, run)
    shard = next(run.glob("iter_*/__0_0.distcp"))
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    assert to_hf(run, tmp_path / "out", "--no-logits") == 3
    assert "__0_0.distcp is altered" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_what_the_exported_model_lacks_is_listed(small, tmp_path, capsys, monkeypatch):
    stock = CheckpointTensors.__init__

    def other(self, *args, **named):
        stock(self, *args, **named)
        self.settings = self.settings | {"window_size": [8, 0], "moe_router_score_function": "sigmoid"}

    monkeypatch.setattr(CheckpointTensors, "__init__", other)
    assert to_hf(small, tmp_path / "out", "--no-logits") == 2
    assert "no --window-size [8, 0], no --moe-router-score-function sigmoid" in capsys.readouterr().err


def test_the_card_shows_the_flags_and_no_place(tmp_path):
    from hmoe_megatron.hf.card import _public

    flags = [
        "--lr",
        "1e-3",
        "--save",
        "a b",
        "--hmoe-placement",
        "/home/me/plan.json",
        "--data-path",
        "0.5",
        "x/y",
        "--wandb-save-dir=/tmp/w",
        "--bf16",
        "--hmoe-placement=auto",
    ]
    assert _public(flags) == ["--lr", "1e-3", "--bf16", "--hmoe-placement=auto"]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--output", "there", "--no-logits"), "exists already"),
        (("--output", "/dev/null/place", "--no-logits"), "/dev/null is no directory"),
    ],
)
def test_a_wrong_output_is_refused(small, tmp_path, flags, said, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there").mkdir()
    assert convert_checkpoint.main(["to-hf", "--load", str(small), *flags]) == 2
    assert said in capsys.readouterr().err


def test_logits_that_differ_leave_nothing(small, tmp_path, capsys, monkeypatch):
    from hmoe_megatron.hf import parity

    (tmp_path / "text").mkdir()
    text = tmp_path / "text" / "text.txt"
    text.write_text("any")
    monkeypatch.setattr(parity, "logits_difference", lambda *given: parity.Difference(16, 1e-3, 2.0))
    assert to_hf(small, tmp_path / "out", "--text", str(text)) == 2
    assert "1.0e-03 apart, over 2.0e-05" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["text"]
