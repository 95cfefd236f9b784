"""There and back: the same tensors to the bit, and stock models of transformers."""

import json
import re
import shutil
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file, save_file

from hmoe_megatron.hf.checkpoint_tensors import CheckpointTensors
from hmoe_megatron.hf.importing import ARGS_FILE, HFDirectory
from tests.distributed.pretrain_run import pretrain
from tests.distributed.ranks import run_ranks
from tests.rows import mostly_rarely, rarely
from tests.unit.hf.conversions import (
    ROOT,
    STEPS,
    TIED,
    assert_configs_are_refused_or_fit,
    assert_same_logits,
    assert_same_tensors,
    from_hf,
    tensors_of,
    to_hf,
    train,
)

KINDS = {
    "cuts, unequal": (2, "--expert-model-parallel-size 2 --hmoe-widths 16,32,48,160", ("native", "padded")),
    "top-p, a dense layer": (
        1,
        "--hmoe-router topp --hmoe-top-p 0.6 --moe-layer-freq [0,1] --ffn-hidden-size 80 --qk-layernorm --add-qkv-bias",
        ("native",),
    ),
    "bf16, grouped queries": (1, "--bf16 --group-query-attention --num-query-groups 2", ("native", "padded")),
    "tied embeddings": (1, TIED, ("native", "padded")),
    "tensor parallel": (2, "--tensor-model-parallel-size 2 --sequence-parallel", ("native",)),
}
IN_SUITE = ("cuts, unequal", "tied embeddings")


@pytest.mark.parametrize("kind", mostly_rarely(KINDS, IN_SUITE))
def test_a_checkpoint_comes_back_to_the_bit(kind, tmp_path):
    ranks, flags, forms = KINDS[kind]
    run = train(tmp_path / "run", ranks, flags)
    for form in forms:
        padded = ("--padded", "mixtral") if form == "padded" else ()
        assert to_hf(run, tmp_path / form, "--no-logits", *padded) == 0
        ended = from_hf(tmp_path / form, tmp_path / f"back {form}")
        assert ended.returncode == 0, ended.stderr[-3000:]
        assert_same_tensors(run, tmp_path / f"back {form}")
        if form == "native":  # every setting of the model too
            assert to_hf(tmp_path / "back native", tmp_path / "again", "--no-logits") == 0
            again, first = ((tmp_path / name / "config.json").read_text() for name in ("again", "native"))
            assert json.loads(again) == json.loads(first)


def test_a_run_goes_on_from_it_under_another_layout(tmp_path):
    run = train(tmp_path / "run", 1, "")
    assert to_hf(run, tmp_path / "out", "--no-logits") == 0
    assert from_hf(tmp_path / "out", tmp_path / "back").returncode == 0
    flags = f"--expert-model-parallel-size 2 --load {tmp_path / 'back'} --finetune"
    assert CheckpointTensors(train(tmp_path / "next", 2, flags)).iteration == 2


@pytest.mark.parametrize("rows", [97, *rarely(96)])
def test_a_vocabulary_keeps_its_rows_under_tensor_parallelism(rows, tmp_path):
    """Of any size; a table that must be divided gets a row, which the next export leaves out."""
    run = train(tmp_path / "run", 1, f"--vocab-size {rows} --make-vocab-size-divisible-by 1")
    assert to_hf(run, tmp_path / "out", "--no-logits") == 0
    assert from_hf(tmp_path / "out", tmp_path / "back").returncode == 0
    described = (tmp_path / "back" / ARGS_FILE).read_text()
    assert f"--padded-vocab-size {rows}\n" in described
    losses = {}
    for ranks in (1, 2):
        flags = (
            f"--padded-vocab-size {rows} --vocab-size {rows} --tensor-model-parallel-size {ranks} --sequence-parallel"
        )
        flags += f" --load {tmp_path / 'back'} --finetune --save {tmp_path / str(ranks)} {STEPS}"
        ended = run_ranks(ranks, pretrain, flags, timeout_s=240)[-1]
        assert ended.code == 0, ended.output
        losses[ranks] = float(re.search(r"iteration +1/.*lm loss: (\S+)", ended.output)[1])
        shape = CheckpointTensors(tmp_path / str(ranks)).shapes["output_layer.weight"]
        assert shape[0] == -(-rows // ranks) * ranks
        assert to_hf(tmp_path / str(ranks), tmp_path / f"out {ranks}", "--no-logits") == 0
        assert json.loads((tmp_path / f"out {ranks}" / "config.json").read_text())["vocab_size"] == rows
    assert losses[2] == pytest.approx(losses[1], rel=1e-5 if rows % 2 == 0 else 2 / rows)


def test_a_tokenizer_of_more_tokens_than_rows_is_refused():
    (ended,) = run_ranks(1, pretrain, "--train-iters 1 --padded-vocab-size 64")
    assert ended.code == 2 and "and the model 64 rows for them (--padded-vocab-size)" in ended.errors()[0]


@pytest.mark.parametrize("name", ["Mixtral", "Qwen3Moe"])
def test_stock_models_become_checkpoints_and_come_back(name, tmp_path):
    import transformers

    sizes = {
        "vocab_size": 128,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "head_dim": 8,
        "num_key_value_heads": 2,
        "intermediate_size": 48,
        "max_position_embeddings": 16,
        "num_experts_per_tok": 2,
    }
    sizes |= (
        {"num_local_experts": 4}
        if name == "Mixtral"
        else {"num_experts": 4, "moe_intermediate_size": 48, "norm_topk_prob": True}
    )
    torch.manual_seed(0)
    stock = getattr(transformers, f"{name}ForCausalLM")(getattr(transformers, f"{name}Config")(**sizes)).eval()
    stock.save_pretrained(tmp_path / "stock")
    text = tmp_path / "text.txt"
    text.write_text("any")
    ended = from_hf(tmp_path / "stock", tmp_path / "run", "--text", text)
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert "16 tokens: at most" in ended.stdout
    assert to_hf(tmp_path / "run", tmp_path / "out", "--text", str(text)) == 0  # Megatron's logits and ours agree
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True).eval()
    assert_same_logits(model, stock)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported")
    run = train(folder / "run", 1, "")
    assert to_hf(run, folder / "out", "--no-logits") == 0
    assert to_hf(run, folder / "padded", "--no-logits", "--padded", "mixtral") == 0
    return folder


def test_a_padded_export_is_a_stock_mixtral(exported):
    from transformers import AutoModelForCausalLM

    padded = AutoModelForCausalLM.from_pretrained(exported / "padded").eval()
    assert type(padded).__name__ == "MixtralForCausalLM" and not list((exported / "padded").glob("*.py"))
    ours = AutoModelForCausalLM.from_pretrained(exported / "out", trust_remote_code=True).eval()
    assert_same_logits(padded, ours)


def test_a_padded_export_is_a_stock_qwen3_moe_and_comes_back(tmp_path):
    """Like examples/qwen3_30b_a3b_like, with a dense layer, and weights of the whole softmax."""
    from transformers import AutoModelForCausalLM

    flags = "--qk-layernorm --group-query-attention --num-query-groups 2 --rotary-base 1000000 --moe-router-pre-softmax"
    run = train(tmp_path / "run", 1, f"{flags} --moe-layer-freq [0,1] --ffn-hidden-size 80")
    assert to_hf(run, tmp_path / "out", "--no-logits") == 0
    assert to_hf(run, tmp_path / "padded", "--no-logits", "--padded", "qwen3_moe") == 0
    padded = AutoModelForCausalLM.from_pretrained(tmp_path / "padded").eval()
    assert type(padded).__name__ == "Qwen3MoeForCausalLM" and not list((tmp_path / "padded").glob("*.py"))
    assert_same_logits(padded, AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True).eval())
    assert from_hf(tmp_path / "padded", tmp_path / "back").returncode == 0
    assert_same_tensors(run, tmp_path / "back")


def test_what_a_stock_model_lacks_is_named(tmp_path, capsys):
    run = train(tmp_path / "run", 1, "")
    assert to_hf(run, tmp_path / "out", "--no-logits", "--padded", "qwen3_moe") == 2
    assert "Qwen3Moe has no queries and keys without --qk-layernorm" in capsys.readouterr().err


def test_top_p_is_not_padded(tmp_path, capsys):
    run = train(tmp_path / "run", 1, "--hmoe-router topp --hmoe-top-p 0.6")
    assert to_hf(run, tmp_path / "out", "--no-logits", "--padded", "mixtral") == 2
    assert "Mixtral has no --hmoe-router topp" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def changed(exported, tmp_path, form, change):
    """A copy in one file, whose tensors `change` has altered."""
    tensors, folder = tensors_of(exported / form), tmp_path / "in"
    folder.mkdir()
    (folder / "config.json").write_bytes((exported / form / "config.json").read_bytes())
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    assert load_file(folder / "model.safetensors").keys() == tensors.keys()
    return folder


EXPERT = "model.layers.1.mlp.experts.2"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda tensors: tensors.pop(f"{EXPERT}.up_proj.weight"), f"1 missing: {EXPERT}.up_proj.weight"),
        (lambda tensors: tensors.update({"model.extra": torch.zeros(1)}), "no place for: model.extra"),
        (lambda tensors: tensors.update({f"{EXPERT}.up_proj.weight": torch.zeros(47, 32)}), "[47, 32], not [48, 32]"),
        (
            lambda tensors: tensors[f"{EXPERT}.up_proj.weight"].fill_(torch.nan),
            f"{EXPERT}.up_proj.weight is not finite",
        ),
    ],
)
def test_a_directory_that_is_not_whole_is_refused(exported, tmp_path, change, said):
    ended = from_hf(changed(exported, tmp_path, "out", change), tmp_path / "run")
    assert ended.returncode == 2 and said in ended.stderr, ended.stderr[-3000:]
    assert not (tmp_path / "run").exists()


def test_padding_that_has_learnt_something_is_not_dropped(exported, tmp_path):
    name = "model.layers.0.block_sparse_moe.experts.0.w1.weight"
    folder = changed(exported, tmp_path, "padded", lambda tensors: tensors[name][40].fill_(1))
    ended = from_hf(folder, tmp_path / "run")
    assert ended.returncode == 2 and "not zero beyond the width 16" in ended.stderr, ended.stderr[-3000:]
    assert not (tmp_path / "run").exists()


@pytest.mark.campaign
def test_killed_while_it_is_proven_it_leaves_nothing_under_the_name(exported, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("any")
    words = [
        sys.executable,
        ROOT / "tools/convert_checkpoint.py",
        "from-hf",
        "--load",
        exported / "out",
        "--save",
        tmp_path / "back",
        "--text",
        text,
    ]
    process = subprocess.Popen([*map(str, words)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline_s = time.monotonic() + 120
    while not (tmp_path / ".back.writing/latest_checkpointed_iteration.txt").exists():
        assert process.poll() is None and time.monotonic() < deadline_s
        time.sleep(0.02)
    process.kill()
    process.wait()
    assert not (tmp_path / "back").exists()
    again = from_hf(exported / "out", tmp_path / "back")
    assert again.returncode == 0, again.stderr[-3000:]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["back", "text.txt"]


def test_two_tensors_of_one_name_are_refused(exported, tmp_path):
    folder = changed(exported, tmp_path, "out", lambda tensors: None)
    shutil.copyfile(folder / "model.safetensors", folder / "other.safetensors")
    names = dict.fromkeys(tensors_of(exported / "out"), "model.safetensors")
    names["lm_head.weight"] = "other.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    with pytest.raises(ValueError, match="no place for: lm_head.weight"):
        HFDirectory(folder)


@pytest.mark.parametrize("name", ["tokenizer.model", "tokenizer.json"])
def test_a_damaged_tokenizer_is_refused(exported, tmp_path, name):
    folder = changed(exported, tmp_path, "out", lambda tensors: None)
    (folder / name).write_text("garbage")
    ended = from_hf(folder, tmp_path / "run")
    assert ended.returncode == 2 and "can't be read as" in ended.stderr, ended.stderr[-3000:]
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_an_index_that_leads_elsewhere_is_refused(exported, tmp_path):
    folder = changed(exported, tmp_path, "out", lambda tensors: None)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../out/model.safetensors"}}))
    ended = from_hf(folder, tmp_path / "run")
    assert ended.returncode == 2 and "names no plain files of the directory" in ended.stderr


@pytest.mark.parametrize("form", ["out", "padded"])
def test_a_config_of_any_content_is_refused_or_fits(exported, tmp_path, form):
    assert_configs_are_refused_or_fit(exported / form, tmp_path)
    for text in ("[]", "null", "", "{}", '{"model_type": ["hmoe"]}', "[" * 100_000):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ValueError, match=r"config\.json"):
            HFDirectory(tmp_path)
