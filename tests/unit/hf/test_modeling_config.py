"""HMoEConfig refuses what can't be a model, with field, value and remedy."""

import pytest
from tiny_models import TOP_P, tiny_config, tiny_model
from transformers import GenerationConfig

from hmoe_megatron.hf.configuration_hmoe import HMoEConfig
from hmoe_megatron.hf.modeling_hmoe import HMoEForCausalLM

REFUSED = [
    ({"vocab_size": 0}, r"vocab_size 0: give a whole number"),
    ({"hidden_size": 32.0}, r"hidden_size 32\.0: give"),
    ({"num_attention_heads": True}, r"num_attention_heads True: give"),
    ({"num_key_value_heads": 3}, r"num_attention_heads 4 is no multiple of num_key_value_heads 3: give a divisor"),
    ({"head_dim": 7}, r"head_dim 7 is odd: .* give an even number"),
    ({"hidden_act": "gelu"}, r"hidden_act 'gelu' is not known: give one of 'silu'"),
    ({"rms_norm_eps": 0}, r"rms_norm_eps 0: give"),
    ({"attention_dropout": 1.0}, r"attention_dropout 1\.0: give a probability below 1"),
    ({"initializer_range": float("nan")}, r"initializer_range nan: give"),
    ({"rope_parameters": {"rope_type": "default", "rope_theta": -1}}, r"rope_parameters .*-1.*: give rope_theta"),
    ({"p_penalty_coeff": -0.1}, r"p_penalty_coeff -0\.1: give"),
    ({"expert_widths": None}, r"expert_widths None, num_hidden_layers is 3: give a list"),
    ({"expert_widths": [[8, 8]]}, r"expert_widths of 1 layers, num_hidden_layers is 3: give a list"),
    ({"expert_widths": [[8, 8], [8, 0], [8, 8]]}, r"expert_widths\[1\] \[8, 0\]: give whole numbers"),
    ({"expert_widths": [[8, 8], [8, 8.5], [8, 8]]}, r"expert_widths\[1\] \[8, 8\.5\]: give"),
    ({"expert_widths": [[8, 8], 8, [8, 8]]}, r"expert_widths\[1\] 8: give"),
    ({"intermediate_size": None}, r"expert_widths\[1\] is \[\], a dense layer, and intermediate_size is None: give"),
    ({"num_experts_per_tok": 4}, r"num_experts_per_tok 4 is more than the 3 experts of .*\[2\]: give at most 3"),
    ({"num_experts_per_tok": 0}, r"num_experts_per_tok 0: give"),
    ({"num_experts_per_tok": None}, r"num_experts_per_tok None: router 'topk' needs"),
    ({"router": "sinkhorn"}, r"router 'sinkhorn' is not known: give one of 'topk', 'topp'"),
    ({"router_dtype": "float64"}, r"router_dtype 'float64' is not known: give one of None, 'float32'"),
    ({"router_scaling_factor": 0.0}, r"router_scaling_factor 0\.0: give a number above 0"),
    ({"router_top_p": 0.6}, r"router_top_p 0\.6 has no effect with router 'topk': remove it"),
    ({"max_experts_per_token": 2}, r"max_experts_per_token 2 has no effect with router 'topk': remove it"),
    ({**TOP_P, "router_top_p": 0}, r"router_top_p 0: router 'topp' needs a probability above 0, at most 1"),
    ({**TOP_P, "router_top_p": 1.01}, r"router_top_p 1\.01: router 'topp' needs"),
    ({**TOP_P, "router_top_p": None}, r"router_top_p None: router 'topp' needs"),
    ({**TOP_P, "max_experts_per_token": 0}, r"max_experts_per_token 0: give"),
    ({**TOP_P, "num_experts_per_tok": 2}, r"num_experts_per_tok 2 has no effect with router 'topp': remove it"),
    ({**TOP_P, "router_pre_softmax": True}, r"router_pre_softmax True has no effect with router 'topp'"),
    ({"expert_path": "grouped"}, r"expert_path 'grouped' is not known: give one of 'sorted', 'loop'"),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED, ids=[str(changes) for changes, _ in REFUSED])
def test_what_is_no_model_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        tiny_config(**changes)


def test_every_problem_is_named_at_once():
    with pytest.raises(ValueError, match=r"(?s)vocab_size -1.*load_balance_coeff inf.*rms_norm_eps -1\.0"):
        tiny_config(vocab_size=-1, rms_norm_eps=-1.0, load_balance_coeff=float("inf"))


def test_defaults_follow_from_what_is_given():
    config = tiny_config(num_key_value_heads=None)
    assert (config.head_dim, config.num_key_value_heads) == (8, 4)
    assert config.rope_parameters == {"rope_type": "default", "rope_theta": 10000.0}
    assert tiny_config(expert_widths=[[], [], []], num_experts_per_tok=None).expert_widths == [[], [], []]
    assert tiny_config(**TOP_P, max_experts_per_token=2).max_experts_per_token == 2


@pytest.mark.parametrize("changes", [{}, TOP_P, {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}])
def test_config_survives_its_file(changes, tmp_path):
    config = tiny_config(**changes)
    config.save_pretrained(tmp_path)
    fields = {name: getattr(config, name) for name in HMoEConfig.__annotations__}
    read = HMoEConfig.from_pretrained(tmp_path)
    assert {name: getattr(read, name) for name in HMoEConfig.__annotations__} == fields


def test_generation_takes_nothing_but_its_own_from_the_config():
    names = set(HMoEConfig.__annotations__) & set(GenerationConfig().to_dict())
    assert names == {"use_cache", "bos_token_id", "eos_token_id", "pad_token_id"}
    assert tiny_model(**TOP_P).generation_config.top_p is None


def test_model_checks_what_was_set_afterwards():
    config = tiny_config()
    config.router = "topx"
    with pytest.raises(ValueError, match="router 'topx' is not known"):
        HMoEForCausalLM(config)
