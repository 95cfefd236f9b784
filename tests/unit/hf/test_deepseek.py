"""DeepSeek-V3 padded, a stock model of transformers, and back; the small models of examples that have HF's form."""

import json
import shutil

import pytest
import torch
from safetensors.torch import save_file

from hmoe_megatron.flag_files import read_args
from hmoe_megatron.hf.checkpoint_tensors import CheckpointTensors
from hmoe_megatron.hf.forms import form_of
from hmoe_megatron.hf.importing import ARGS_FILE, HFDirectory
from tests.distributed.pretrain_run import start
from tests.distributed.ranks import run_ranks
from tests.rows import rarely
from tests.unit.hf.conversions import (
    ROOT,
    TIED,
    assert_configs_are_refused_or_fit,
    assert_same_logits,
    assert_same_tensors,
    from_hf,
    tensors_of,
    to_hf,
    train,
)

PADDED = ("--padded", "deepseek_v3")
ON_NO_MACHINE = "--mock-data --eval-iters 0 --num-workers 0 --hmoe-console megatron".split()
# Without groups, under YaRN, with wide shared experts and two tokens more; not the example's.
OTHER = (
    "--multi-latent-attention --q-lora-rank 20 --kv-lora-rank 12 --qk-head-dim 8 --qk-pos-emb-head-dim 4 "
    "--v-head-dim 6 --qk-layernorm --no-rope-fusion --rotary-scaling-factor 40 --mscale-all-dim 1 --norm-epsilon 1e-6 "
    "--moe-router-score-function sigmoid --moe-router-enable-expert-bias --moe-router-load-balancing-type none "
    "--hmoe-p-penalty-coeff 0 --moe-shared-expert-intermediate-size 80 --mtp-num-layers 2"
)
KINDS = {
    "no groups, yarn": (1, OTHER),
    "bf16": (1, f"--bf16 {OTHER}"),
    "dense layer": (1, f"{OTHER} --moe-layer-freq [0,1] --ffn-hidden-size 72 --hmoe-widths 16,32,48,160"),
    "tied": (1, f"{OTHER} {TIED}"),
    "tensor parallel": (2, f"{OTHER} --tensor-model-parallel-size 2 --sequence-parallel"),
}


def trained(root, example, steps):
    words = [*read_args(ROOT / "examples" / example / "tiny_cpu.args"), *ON_NO_MACHINE]
    words += f"--tokenizer-type NullTokenizer --vocab-size 127 --train-iters {steps} --save {root}".split()
    assert [code for code, _ in run_ranks(2, start, words, timeout_s=120)] == [0, 0]
    return root


@pytest.fixture(scope="module")
def example(tmp_path_factory):
    """run: the small model of the example after three steps."""
    folder = tmp_path_factory.mktemp("example")
    trained(folder / "run", "deepseek_v3_like", 3)
    return folder


@pytest.fixture(scope="module")
def exported(example):
    """out beside it, as DeepSeek-V3."""
    assert to_hf(example / "run", example / "out", "--no-logits", *PADDED) == 0
    return example


def test_the_example_is_a_stock_deepseek_v3_comes_back_and_goes_on(example, tmp_path, capsys):
    run, text = example / "run", tmp_path / "text.txt"
    text.write_text("any")  # the run has no tokenizer: random ids
    assert to_hf(run, tmp_path / "out", "--text", str(text), *PADDED) == 0, capsys.readouterr().err
    told = json.loads((tmp_path / "out/hmoe_export.json").read_text())["logits"]
    assert told["largest_difference"] <= 1e-5 < told["largest_logit"] and told["tokens"] == 64
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["architectures"] == ["DeepseekV3ForCausalLM"] and not list((tmp_path / "out").glob("*.py"))
    ended = from_hf(tmp_path / "out", tmp_path / "back")
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert_same_tensors(run, tmp_path / "back")
    bias = CheckpointTensors(run).read(["decoder.layers.2.mlp.router.expert_bias"])
    assert all(tensor.any() for tensor in bias.values()), "a bias of zeros tests nothing"
    words = [*read_args(tmp_path / "back" / ARGS_FILE), *ON_NO_MACHINE, "--finetune", "--load", str(tmp_path / "back")]
    words += "--tensor-model-parallel-size 2 --sequence-parallel --expert-tensor-parallel-size 1 --lr 1e-3".split()
    words += "--micro-batch-size 2 --global-batch-size 4 --train-iters 1 --eval-interval 9 --log-interval 1".split()
    ends = run_ranks(2, start, words, timeout_s=120)
    assert [code for code, _ in ends] == [0, 0] and "iteration        1/" in ends[-1][1], ends[0][1][-3000:]


def test_layers_that_predict_have_the_official_names(exported):
    found, config = tensors_of(exported / "out"), json.loads((exported / "out/config.json").read_text())
    assert config["num_nextn_predict_layers"] == 1 and config["num_hidden_layers"] == 3
    assert torch.equal(found["model.layers.3.embed_tokens.weight"], found["model.embed_tokens.weight"])
    assert torch.equal(found["model.layers.3.shared_head.head.weight"], found["lm_head.weight"])
    ours = CheckpointTensors(exported / "run")
    for key, name in (("eh_proj", "eh_proj"), ("final_layernorm", "shared_head.norm"), ("hnorm", "hnorm")):
        key = f"mtp.layers.0.{key}.weight"
        assert torch.equal(ours.read([key])[key], found[f"model.layers.3.{name}.weight"])
    assert found["model.layers.3.mlp.experts.0.up_proj.weight"].shape == (96, 64)  # 36, padded to 92 and to 16 bytes
    shared = found["model.layers.1.mlp.shared_experts.up_proj.weight"]
    assert shared.shape == (96, 64) and shared[:64].any() and not shared[64:].any()
    assert (config["n_shared_experts"], config["first_k_dense_replace"], config["intermediate_size"]) == (1, 1, 192)


@pytest.mark.campaign
def test_transformers_predicts_the_token_that_megatron_predicts(exported, tmp_path):
    """With transformers' own module of it, which looks for layer 61 only."""
    layers = pytest.importorskip("transformers.modeling_layers")
    if not hasattr(layers, "MtpModel"):
        pytest.skip("this transformers has no MtpModel")
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(exported / "out", dtype=torch.float32).eval()
    model._keys_to_ignore_on_load_unexpected = [r"model\.layers\.3\."]
    predicting, tokens_T = layers.MtpModel.from_pretrained(model).eval(), torch.arange(32)[None]
    with torch.no_grad():
        hidden = model.model(tokens_T, use_cache=False).last_hidden_state
        # Megatron's embedding of the token after the last is that of token 0.
        ahead_T = tokens_T.roll(-1, 1).index_fill(1, torch.tensor([31]), 0)
        found = predicting.forward_layer(0, hidden, torch.arange(32)[None], None, input_ids=ahead_T)
        (expected,) = run_ranks(1, _predicted, str(exported / "run"), timeout_s=120)
        torch.testing.assert_close(model.lm_head(found)[0], torch.tensor(expected), rtol=0, atol=1e-5)


def _predicted(run):
    from hmoe_megatron import training
    from hmoe_megatron.hf.one_process import load_model

    training.prepare()
    model, found = load_model(run), []
    inner = next(module for module in model.modules() if hasattr(module, "mtp"))
    inner.mtp.register_forward_hook(lambda module, given, out: found.append(out.chunk(2)[1]))
    with torch.no_grad():
        model(torch.arange(32)[None], torch.arange(32)[None], None)
        return inner.output_layer(found[0])[0][:, 0].tolist()


@pytest.mark.parametrize("kind", rarely(*KINDS))
def test_other_models_come_back_to_the_bit(kind, tmp_path, capsys):
    run = train(tmp_path / "run", *KINDS[kind])
    (tmp_path / "text.txt").write_text("any")
    assert to_hf(run, tmp_path / "out", "--text", str(tmp_path / "text.txt"), *PADDED) == 0, capsys.readouterr().err
    biases = {name: tensor for name, tensor in tensors_of(tmp_path / "out").items() if name.endswith("bias")}
    assert len(biases) >= 2 and {tensor.dtype for tensor in biases.values()} == {torch.float32}
    ended = from_hf(tmp_path / "out", tmp_path / "back")
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert_same_tensors(run, tmp_path / "back")
    assert to_hf(tmp_path / "back", tmp_path / "again", "--no-logits", *PADDED) == 0
    again, first = ((tmp_path / name / "config.json").read_text() for name in ("again", "out"))
    assert again == first


SIZES = {
    "vocab_size": 128,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "intermediate_size": 40,
    "moe_intermediate_size": 24,
    "n_routed_experts": 8,
    "n_shared_experts": 2,
    "num_experts_per_tok": 4,
    "n_group": 4,
    "topk_group": 2,
    "first_k_dense_replace": 1,
    "q_lora_rank": 12,
    "kv_lora_rank": 8,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 6,
    "max_position_embeddings": 16,
    # The official one's, for more tokens.
    "rope_parameters": {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 40.0,
        "original_max_position_embeddings": 4096,
        "beta_fast": 32,
        "beta_slow": 1,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
    },
}


@pytest.fixture(scope="module")
def stock(tmp_path_factory):
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    folder = tmp_path_factory.mktemp("stock") / "stock"
    torch.manual_seed(0)
    model = DeepseekV3ForCausalLM(DeepseekV3Config(**SIZES)).eval()
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.uniform_(-0.1, 0.1)
    model.save_pretrained(folder)
    return folder, model


def test_a_stock_deepseek_v3_becomes_a_checkpoint_and_comes_back(stock, tmp_path):
    """transformers saves the number of layers that predict, and none of them."""
    from transformers import AutoModelForCausalLM

    folder, model = stock
    (tmp_path / "text.txt").write_text("any")
    ended = from_hf(folder, tmp_path / "run", "--text", tmp_path / "text.txt")
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert "16 tokens: at most" in ended.stdout and "no tensors of the layers that predict" in ended.stderr
    assert to_hf(tmp_path / "run", tmp_path / "out", "--no-logits", *PADDED) == 0
    ours, theirs = tensors_of(tmp_path / "out"), tensors_of(folder)
    assert json.loads((tmp_path / "out/config.json").read_text())["moe_intermediate_size"] == 24
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert_same_logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval(), model)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"topk_group": 1}, "--moe-router-group-topk other than half"),
        ({"q_lora_rank": None}, "queries without --q-lora-rank"),
        ({"n_group": 8}, "groups of experts that are one"),
        ({"rms_norm_eps": 1e-5}, "rms_norm_eps 1e-05"),
        ({"norm_topk_prob": False}, "norm_topk_prob False"),
        ({"rope_interleave": False}, "rope_interleave False"),
        ({"attention_bias": True}, "attention_bias True"),
        ({"num_key_value_heads": 2}, "num_key_value_heads 2"),
        ({"routed_scaling_factor": 0}, "scaling_factor 0"),
        ({"quantization_config": {"fmt": "e4m3"}}, "quantization_config {'fmt'"),
        ({"scoring_func": "softmax"}, "scoring_func 'softmax'"),
        ({"n_shared_experts": 0}, "n_shared_experts 0: 1 to"),
        ({"first_k_dense_replace": 3}, "no other layers than dense ones"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4, "beta_fast": 16}}, "beta_fast 16"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4, "mscale": 2}}, "such a pair of --mscale"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 4}}, "rope_type 'linear'"),
    ],
)
def test_a_config_that_cant_be_trained_here_is_refused(stock, changed, said):
    config = json.loads((stock[0] / "config.json").read_text())
    form_of(config)
    with pytest.raises(ValueError, match=said.replace("(", r"\(")):
        form_of(config | changed)


def test_a_config_of_any_content_is_refused_or_fits(exported, tmp_path):
    assert_configs_are_refused_or_fit(exported / "out", tmp_path)


def test_other_forms_name_the_one_that_fits(example, tmp_path, capsys):
    for padded in ((), ("--padded", "qwen3_moe")):
        assert to_hf(example / "run", tmp_path / "out", "--no-logits", *padded) == 2
        said = capsys.readouterr().err
        assert "no --multi-latent-attention True" in said and said.endswith("; give --padded deepseek_v3\n")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"layernorm_epsilon": 1e-5}, "--norm-epsilon other than 1e-06"),
        ({"moe_router_group_topk": 1}, "--moe-router-group-topk other than half of --moe-router-topk"),
        ({"moe_router_num_groups": 16}, "groups of experts that are one"),
        ({"q_lora_rank": None}, "queries without --q-lora-rank"),
        ({"qk_layernorm": False}, "latent vectors without --qk-layernorm"),
        ({"moe_shared_expert_intermediate_size": None}, "layers without --moe-shared-expert-intermediate-size"),
        ({"mscale_all_dim": 1.0, "rotary_scaling_factor": 40.0}, "--mscale-all-dim with --rope-type rope"),
        ({"moe_router_enable_expert_bias": False}, "no --moe-router-enable-expert-bias False"),
        ({"moe_router_score_function": "softmax"}, "no --moe-router-score-function softmax"),
        ({"multi_latent_attention": False}, "no --multi-latent-attention False"),
        ({"moe_shared_expert_gate": True}, "no --moe-shared-expert-gate True"),
    ],
)
def test_what_a_deepseek_v3_lacks_is_named_before_work_starts(example, tmp_path, capsys, monkeypatch, settings, said):
    first = CheckpointTensors.__init__

    def other(self, *args, **named):
        first(self, *args, **named)
        self.settings = self.settings | settings

    monkeypatch.setattr(CheckpointTensors, "__init__", other)
    assert to_hf(example / "run", tmp_path / "out", "--no-logits", *PADDED) == 2
    assert said in capsys.readouterr().err
    assert to_hf(example / "run", tmp_path / "out", "--no-logits") == 2
    assert not capsys.readouterr().err.endswith("; give --padded deepseek_v3\n")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("model.layers.1.mlp.shared_experts.down_proj.weight", "not zero beyond the width 64"),
        ("model.layers.3.embed_tokens.weight", "model.layers.3.embed_tokens.weight is not model.embed_tokens.weight"),
    ],
)
def test_what_was_learnt_is_not_dropped(exported, tmp_path, name, said):
    tensors = tensors_of(exported / "out")
    tensors[name][:, -1] += 1
    shutil.copyfile(exported / "out/config.json", tmp_path / "config.json")
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=said):
        HFDirectory(tmp_path).read(name)


def test_the_qwen3_example_goes_to_hf_and_back(tmp_path, capsys):
    run = trained(tmp_path / "run", "qwen3_30b_a3b_like", 2)
    (tmp_path / "text.txt").write_text("any")
    text = ("--text", str(tmp_path / "text.txt"))
    assert to_hf(run, tmp_path / "out", *text, "--padded", "qwen3_moe") == 0, capsys.readouterr().err
    ended = from_hf(tmp_path / "out", tmp_path / "back")
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert_same_tensors(run, tmp_path / "back")
