"""A dense model becomes an HMoE that computes the same with all experts on, and the same on average with fewer."""

import itertools
import json
import shutil

import pytest
import torch
import transformers
from safetensors.torch import save_file

from hmoe_megatron.hf.checkpoint_tensors import CheckpointTensors
from hmoe_megatron.hf.hmoe_layer import top_k_routing, top_p_routing
from hmoe_megatron.hf.upcycling import Upcycled
from tests.rows import rarely
from tests.unit.hf.conversions import assert_same_logits, convert, tensors_of, to_hf, train

SIZES = {
    "vocab_size": 128,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "head_dim": 8,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "max_position_embeddings": 16,
}
WIDTHS = (8, 16, 24, 48)
CUT = ("--num-experts", "4", "--hmoe-widths", ",".join(map(str, WIDTHS)))


def dense(folder, name="Llama", **settings):
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**SIZES, initializer_range=0.3, **settings)
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize(
    ("name", "settings", "router"),
    [
        ("Llama", {}, "--moe-router-topk 4"),
        ("Qwen3", {"tie_word_embeddings": True}, "--moe-router-topk 3 --moe-router-pre-softmax"),
        *rarely(
            ("Qwen3", {}, "--moe-router-topk 2"),
            ("Llama", {}, "--hmoe-top-p 0.6"),
            ("Llama", {"dtype": torch.bfloat16}, "--moe-router-topk 2"),
        ),
    ],
)
def test_with_all_experts_on_it_computes_what_the_dense_model_does(name, settings, router, tmp_path):
    stock, text = dense(tmp_path / "dense", name, **settings), tmp_path / "text.txt"
    text.write_text("any")  # no tokenizer: random ids
    words = ("upcycle", "--load", tmp_path / "dense", "--save", tmp_path / "run", *CUT, *router.split())
    ended = convert(*words, "--text", text)
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert "experts of width 8, 16, 24, 48; down_proj times" in ended.stdout
    assert "logits of Megatron and transformers, fp32, 16 tokens: at most" in ended.stdout
    if router == "--moe-router-topk 4":  # as it is
        assert to_hf(tmp_path / "run", tmp_path / "out", "--text", str(text)) == 0
        ours = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True).eval()
        assert_same_logits(ours, stock)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("upcycled")
    dense(folder / "dense")
    return folder


ROUTERS = {"Top-K": {"router": "topk", "pre_softmax": False}, "before it": {"router": "topk", "pre_softmax": True}}


@pytest.mark.parametrize("kind", ROUTERS)
@pytest.mark.parametrize("chosen", [1, 2, 4])
def test_the_mean_over_evenly_chosen_experts_is_the_dense_layer(folder, kind, chosen):
    source = Upcycled(folder / "dense", WIDTHS, ROUTERS[kind] | {"experts_per_token": chosen})
    found = {
        name: tensor
        for part, tensor in source.tensors()
        for name, tensor in zip(part.names, part.split(tensor), strict=True)
    }
    x_H, layer, outputs = torch.randn(32), "model.layers.1.mlp", []
    experts = [
        [found[f"{layer}.experts.{expert}.{name}_proj.weight"] for name in ("gate", "up", "down")]
        for expert in range(4)
    ]
    out_EH = [down @ (torch.nn.functional.silu(gate @ x_H) * (up @ x_H)) for gate, up, down in experts]
    for selected in itertools.combinations(range(4), chosen):
        logits_TE = torch.zeros(1, 4)
        logits_TE[0, list(selected)] = 1e-7  # chosen, by nearly nothing
        weights_TE, _ = top_k_routing(logits_TE, chosen, ROUTERS[kind]["pre_softmax"])
        outputs.append(sum(weights_TE[0, expert] * out_EH[expert] for expert in selected))
    stock = tensors_of(folder / "dense")
    gate, up, down = (stock[f"{layer}.{name}_proj.weight"] for name in ("gate", "up", "down"))
    whole_H = down @ (torch.nn.functional.silu(gate @ x_H) * (up @ x_H))
    torch.testing.assert_close(torch.stack(outputs).mean(0), whole_H, rtol=1e-4, atol=1e-5)


def test_top_p_has_the_scale_of_renormalised_weights():
    weights_TE, _ = top_p_routing(torch.zeros(1, 4), 0.6, None)
    assert weights_TE.count_nonzero() == 3 and float(weights_TE.sum()) == pytest.approx(1)


def test_every_neuron_goes_to_one_expert_unchanged(folder):
    source = Upcycled(folder / "dense", WIDTHS, ROUTERS["Top-K"] | {"experts_per_token": 2}, seed=1)
    stock = tensors_of(folder / "dense")
    for layer in range(2):
        name = f"model.layers.{layer}.mlp"
        experts = {
            matrix: [source.read(f"{name}.experts.{expert}.{matrix}_proj.weight") for expert in range(4)]
            for matrix in ("gate", "up", "down")
        }
        assert tuple(gate.shape[0] for gate in experts["gate"]) == WIDTHS
        for matrix in ("gate", "up"):
            assert torch.equal(torch.cat(experts[matrix]), stock[f"{name}.{matrix}_proj.weight"])
        assert torch.equal(torch.cat(experts["down"], dim=1) / 4, stock[f"{name}.down_proj.weight"])
    routers = [source.read(f"model.layers.{layer}.mlp.gate.weight") for layer in range(2)]
    assert not torch.equal(*routers) and all(0.2 < router.std() < 0.4 for router in routers)
    assert torch.equal(routers[0], source.read("model.layers.0.mlp.gate.weight"))


def with_tensors(folder, copy, more):
    """A copy of the dense directory with more tensors in its file."""
    shutil.copytree(folder / "dense", copy)
    save_file(tensors_of(copy) | more, copy / "model.safetensors", metadata={"format": "pt"})
    return copy


def test_rotary_tables_of_the_configuration_are_no_weights(folder, tmp_path):
    """Llama 2's published files hold them."""
    table = 10000 ** -(torch.arange(0, 8, 2) / 8)
    names = [f"model.layers.{layer}.self_attn.rotary_emb.inv_freq" for layer in (0, 1)] + ["model.rotary_emb.inv_freq"]
    more = {name: table.to(torch.bfloat16) for name in names} | {"model.rotary_emb.cos_cached": torch.ones(4, 8)}
    settings = ROUTERS["Top-K"] | {"experts_per_token": 2}
    source = Upcycled(with_tensors(folder, tmp_path / "old", more), WIDTHS, settings)
    assert source.dtype == torch.float32
    assert len(list(source.tensors())) == len(list(Upcycled(folder / "dense", WIDTHS, settings).tensors()))
    other = with_tensors(folder, tmp_path / "other", {names[0]: table / 2})
    with pytest.raises(ValueError, match="rotary_emb.inv_freq is not that of rope_theta 10000"):
        Upcycled(other, WIDTHS, settings)


def test_halves_are_scaled_in_fp32(tmp_path):
    """E = 6 is no power of two: in fp16 the product would be rounded."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SIZES)
    transformers.LlamaForCausalLM(config).half().save_pretrained(tmp_path / "dense")
    source = Upcycled(tmp_path / "dense", (16,) * 6, ROUTERS["Top-K"] | {"experts_per_token": 2})
    name, stock = "model.layers.0.mlp", tensors_of(tmp_path / "dense")
    down = torch.cat([source.read(f"{name}.experts.{expert}.down_proj.weight") for expert in range(6)], dim=1)
    assert source.dtype == torch.float32
    assert torch.equal(down, stock[f"{name}.down_proj.weight"].float() * 6)


@pytest.mark.parametrize(
    "changed",
    [
        {"rope_scaling": {"type": "linear", "factor": 4.0}, "rope_parameters": None},
        {"partial_rotary_factor": 0.5},
        {"num_attention_heads": 0, "head_dim": None},
        {"initializer_range": -1},
        {"num_hidden_layers": 2**40},
        {"rope_parameters": {"rope_theta": -5.0}},
        {"rope_parameters": {"rope_theta": 10000.5}},
        {"hidden_act": "gelu"},
        {"model_type": "mixtral", "num_local_experts": 2**31},
        {"model_type": "qwen3_moe", "decoder_sparse_step": 0},
        {"model_type": "mixtral", "num_local_experts": True},
        {"model_type": "qwen3_moe", "num_experts": 10**13},
    ],
)
def test_what_a_config_asks_in_vain_is_refused(folder, changed):
    from hmoe_megatron.hf.forms import form_of

    config = json.loads((folder / "dense/config.json").read_text())
    more = {"num_experts": 4, "num_local_experts": 4, "moe_intermediate_size": 8, "num_experts_per_tok": 2}
    form_of(config), form_of(config | more | {"model_type": "mixtral"})
    with pytest.raises(ValueError, match=r"config\.json"):
        form_of(config | more | changed)


def test_a_mixtral_without_a_base_has_that_of_transformers():
    from hmoe_megatron.hf.architectures import Mixtral

    config = transformers.MixtralConfig(**SIZES).to_dict()
    assert Mixtral.settings(config | {"rope_parameters": None}).rope_theta == config["rope_parameters"]["rope_theta"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--num-experts", "4", "--hmoe-widths", "8,16,24,40"), "add up to 88"),
        (("--num-experts", "4", "--hmoe-widths", "arithmetic:9"), "arithmetic"),
    ],
)
def test_wrong_widths_are_refused(folder, tmp_path, words, said):
    ended = convert(
        "upcycle",
        "--load",
        folder / "dense",
        "--save",
        tmp_path / "run",
        *words,
        "--moe-router-topk",
        "2",
        "--no-logits",
    )
    assert ended.returncode == 2 and said in ended.stderr, ended.stderr[-2000:]
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (("from-hf",), "a dense model has no experts to bring back: use upcycle"),
        (("upcycle", *CUT, "--moe-router-topk", "5"), "--moe-router-topk: 1 to --num-experts"),
        (("upcycle", *CUT), "--moe-router-topk K or --hmoe-top-p P: give one of them"),
    ],
)
def test_wrong_commands_are_refused(folder, tmp_path, command, said):
    ended = convert(*command, "--load", folder / "dense", "--save", tmp_path / "run", "--no-logits")
    assert ended.returncode == 2 and said in ended.stderr, ended.stderr[-2000:]
    assert not (tmp_path / "run").exists()


def test_a_run_goes_on_from_it_by_its_args_file(folder, tmp_path):
    from hmoe_megatron.flag_files import read_args

    ended = convert(
        "upcycle", "--load", folder / "dense", "--save", tmp_path / "run", *CUT, "--moe-router-topk", "2", "--no-logits"
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    described = " ".join(read_args(tmp_path / "run/model.args"))
    flags = f"{described} --expert-model-parallel-size 2 --load {tmp_path / 'run'} --finetune"
    stored = CheckpointTensors(train(tmp_path / "next", 2, flags)).shapes
    assert stored["decoder.layers.0.mlp.experts.3.linear_fc2.weight"] == (32, 48)


def test_one_half_precision_tensor_makes_no_half_precision_model(folder, tmp_path):
    tensors = tensors_of(folder / "dense")
    name = "model.embed_tokens.weight"
    mixed = with_tensors(folder, tmp_path / "mixed", {name: tensors[name].to(torch.bfloat16)})
    assert Upcycled(mixed, WIDTHS, ROUTERS["Top-K"] | {"experts_per_token": 2}).dtype == torch.float32


def test_layers_of_qwens_sparse_step_are_those_of_transformers():
    from hmoe_megatron.hf.forms import form_of

    config = transformers.Qwen3MoeConfig(
        **SIZES, num_experts=4, moe_intermediate_size=48, num_experts_per_tok=2, decoder_sparse_step=2
    )
    config.num_hidden_layers = 5
    stock = transformers.Qwen3MoeForCausalLM(config)
    sparse = [hasattr(layer.mlp, "experts") for layer in stock.model.layers]
    assert sparse == [False, True, False, True, False]
    assert [bool(widths) for widths in form_of(config.to_dict()).model.widths] == sparse


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"mlp_only_layers": [0, 1]}, "no layer has experts"),
        ({"hmoe_expert_widths": [[], []]}, "no layer has experts"),
        ({"attention_bias": True}, "attention_bias true"),
    ],
)
def test_a_qwen3_moe_that_is_none(changed, said):
    from hmoe_megatron.hf.forms import form_of

    config = transformers.Qwen3MoeConfig(num_hidden_layers=2, num_experts=4, num_experts_per_tok=2).to_dict()
    form_of(config)
    with pytest.raises(ValueError, match=said):
        form_of(config | changed)
