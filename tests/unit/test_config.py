"""Flags come from HMoEConfig, and every refusal says what, why and what to do."""

import argparse
import dataclasses
from pathlib import Path

import pytest

from hmoe_megatron import validate_args as refusals
from hmoe_megatron.config import HMoEConfig, add_hmoe_arguments, hmoe_config_from_args, widths_from_args
from hmoe_megatron.validate_args import (
    MET,
    REQUIRED,
    REQUIRED_TOPP,
    REQUIRED_WITH_LOSSES,
    check_megatron_arguments,
    met_flags,
)
from hmoe_megatron.validate_args.page import megatron_flags_document

FLAGS = {
    "--hmoe-widths",
    "--hmoe-total-width",
    "--hmoe-width-multiple",
    "--hmoe-router",
    "--hmoe-top-p",
    "--hmoe-max-experts-per-token",
    "--hmoe-p-penalty-coeff",
    "--hmoe-router-entropy-coeff",
    "--hmoe-load-balance-coeff",
    "--hmoe-placement",
    "--hmoe-max-cuts",
    "--hmoe-cut-multiple",
    "--hmoe-gemm-backend",
    "--hmoe-keep-hidden",
    "--hmoe-run-dir",
    "--hmoe-check-only",
    "--hmoe-console",
    "--hmoe-default-signals",
    "--hmoe-idle-expert-steps",
    "--hmoe-replan-interval",
    "--hmoe-replan-max-loss",
    "--hmoe-replan-room",
    "--hmoe-skip-integrity",
    "--hmoe-verify-data",
    "--hmoe-max-failed-saves",
}


def parse(*argv):
    return add_hmoe_arguments(argparse.ArgumentParser()).parse_args(argv)


def test_the_set_of_flags():
    """Frozen: a flag that comes, goes or is renamed is a change users see."""
    actions = add_hmoe_arguments(argparse.ArgumentParser())._actions
    assert {option for action in actions for option in action.option_strings if option.startswith("--hmoe")} == FLAGS
    assert all(action.help for action in actions)
    assert len(FLAGS) == len(dataclasses.fields(HMoEConfig))


def test_flags_and_config_agree():
    assert hmoe_config_from_args(parse()) == HMoEConfig()
    config = hmoe_config_from_args(parse("--hmoe-router", "topp", "--hmoe-top-p", "0.6", "--hmoe-total-width", "128"))
    assert (config.router, config.top_p, config.total_width) == ("topp", 0.6, 128)


def test_the_entropy_loss_is_the_papers_with_top_p_and_off_with_top_k():
    assert HMoEConfig().entropy_coeff == 0
    assert HMoEConfig(router="topp", top_p=0.6).entropy_coeff == 0.03
    assert HMoEConfig(router="topp", top_p=0.6, router_entropy_coeff=0.0).entropy_coeff == 0
    assert HMoEConfig().p_penalty_coeff == 0.1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"p_penalty_coeff": -1.0}, "--hmoe-p-penalty-coeff -1.0: give a finite number, 0 or more"),
        ({"load_balance_coeff": float("nan")}, "--hmoe-load-balance-coeff nan: give a finite number, 0 or more"),
        ({"total_width": 0}, "--hmoe-total-width 0: give a whole number of at least 1"),
        ({"cut_multiple": 0}, "--hmoe-cut-multiple 0: give a whole number of at least 1"),
        ({"max_cuts": -1}, "--hmoe-max-cuts -1: give 0 or more"),
        ({"router": "topp"}, "--hmoe-router topp needs --hmoe-top-p"),
        ({"router": "topp", "top_p": 1.5}, "--hmoe-top-p 1.5: give a probability above 0, at most 1"),
        ({"top_p": 0.5}, "--hmoe-top-p 0.5 has no effect with --hmoe-router topk"),
        ({"max_experts_per_token": 3}, "--hmoe-max-experts-per-token 3 has no effect with --hmoe-router topk"),
        ({"router_entropy_coeff": 0.1}, "--hmoe-router-entropy-coeff 0.1 contradicts --hmoe-router topk"),
        ({"placement": "best"}, "--hmoe-placement 'best': give auto, contiguous, checkpoint, or the path of a plan"),
        ({"placement": "a.json", "max_cuts": 1}, "--hmoe-max-cuts 1 contradicts --hmoe-placement a.json"),
        ({"placement": "contiguous", "max_cuts": 1}, "--hmoe-max-cuts 1 contradicts --hmoe-placement contiguous"),
    ],
)
def test_contradictions_among_our_flags(settings, message):
    with pytest.raises(ValueError) as refused:
        HMoEConfig(**settings)
    assert message in str(refused.value)


def test_cuts_of_plans_to_come_go_with_a_plan_at_the_start():
    assert HMoEConfig(placement="checkpoint", max_cuts=0, replan_interval="10").max_cuts == 0


def good_arguments(**changes):
    values = {name: next(iter(sorted(allowed, key=str))) for name, allowed, _, _ in (*REQUIRED, *REQUIRED_TOPP)}
    values |= {"eval_interval": 10, "deterministic_mode": False, "use_distributed_optimizer": False}
    values |= {"async_save": False, "bias_swiglu_fusion": False, "use_te_activation_func": False}
    values |= {"sft": False, "reset_attention_mask": False, "fp4": None, "untie_embeddings_and_output_weights": True}
    values |= {"num_virtual_stages_per_pipeline_rank": None, "num_layers_per_virtual_pipeline_stage": None}
    values |= {"pipeline_model_parallel_layout": None}
    values |= {"activation_func_clamp_value": None, "glu_linear_offset": 0.0}
    values |= dict.fromkeys(("num_layers", "hidden_size", "num_attention_heads", "seq_length", "micro_batch_size"), 4)
    values |= {"context_parallel_size": 1, "fp8": None, "bf16": False, "moe_token_dispatcher_type": "alltoall"}
    values |= {"expert_model_parallel_size": 1, "expert_tensor_parallel_size": None, "tensor_model_parallel_size": 1}
    values |= {"train_iters": 10, "train_samples": None, "lr": 1e-3, "min_lr": 0.0, "save": None, "world_size": 2}
    values |= {"pipeline_model_parallel_size": 1, "sequence_parallel": False, "mtp_num_layers": None}
    values |= {"num_experts": 8, "moe_router_topk": 2, "recompute_granularity": None, "recompute_modules": None}
    return argparse.Namespace(**(values | changes))


# Frozen: a row that is lost lets a setting through that trains something else in silence.
REFUSED = set(
    (
        "swiglu add_bias_linear moe_flex_dispatcher_backend moe_use_upcycling fp8_param_gather optimizer "
        "moe_expert_rank_capacity_factor overlap_dispatch_backward_with_experts_wgrad delay_wgrad_compute "
        "expert_tensor_parallel_num_weight_shards tensor_parallel_num_weight_shards hybrid_layer_pattern "
        "experimental_attention_variant use_megatron_fsdp use_torch_fsdp2 heterogeneous_layers_config_path "
        "transformer_impl ckpt_format non_persistent_ckpt_type ckpt_convert_format enable_msc "
        "fine_grained_activation_offloading cuda_graph_impl "
    ).split()
)
REFUSED_TOPP = set(
    "moe_router_load_balancing_type moe_aux_loss_coeff moe_router_score_function moe_router_enable_expert_bias "
    "moe_router_num_groups moe_router_topk_scaling_factor moe_router_fusion moe_enable_routing_replay "
    "moe_apply_probs_on_input".split()
)


def test_what_is_refused():
    assert {name for name, *_ in REQUIRED} == REFUSED
    assert {name for name, *_ in REQUIRED_TOPP} == REFUSED_TOPP
    names = {name for name, *_ in REQUIRED_WITH_LOSSES}
    assert names == {"moe_router_score_function", "moe_router_load_balancing_type"}


def test_the_distributed_optimizer_needs_the_format_that_any_plan_loads():
    wrong = good_arguments(use_distributed_optimizer=True, dist_ckpt_optim_fully_reshardable=False)
    with pytest.raises(ValueError, match="--use-distributed-optimizer without --dist-ckpt-optim-fully-reshardable"):
        check_megatron_arguments(wrong, HMoEConfig())
    check_megatron_arguments(
        good_arguments(use_distributed_optimizer=True, dist_ckpt_optim_fully_reshardable=True), HMoEConfig()
    )


def test_deterministic_mode_with_top_p_is_refused_where_there_is_a_gpu():
    args = good_arguments(deterministic_mode=True)
    with pytest.raises(ValueError, match="--deterministic-mode contradicts --hmoe-router topp on a GPU"):
        check_megatron_arguments(args, TOPP, has_gpu=True)
    check_megatron_arguments(args, TOPP)
    check_megatron_arguments(args, HMoEConfig(), has_gpu=True)


def test_recompute_of_norms_needs_transformer_engine(monkeypatch):
    args = good_arguments(recompute_granularity="selective", recompute_modules=["core_attn", "layernorm"])
    with pytest.raises(ValueError, match="--recompute-modules layernorm: .* leave layernorm out"):
        check_megatron_arguments(args, HMoEConfig())
    monkeypatch.setattr(refusals, "find_spec", lambda name: name == "transformer_engine")
    check_megatron_arguments(args, HMoEConfig())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"context_parallel_size": 2}, "--context-parallel-size 2 contradicts --transformer-impl local"),
        ({"fp8": "hybrid"}, "--fp8-format hybrid contradicts --transformer-impl local"),
        ({"fp4": "e2m1"}, "--fp4-format e2m1 contradicts --transformer-impl local"),
        ({"use_te_activation_func": True}, "--use-te-activation-func contradicts --transformer-impl local"),
        ({"moe_token_dispatcher_type": "flex", "expert_model_parallel_size": 2}, "add --bf16"),
        ({"moe_token_dispatcher_type": "flex", "bf16": True}, "nothing is dispatched; use alltoall"),
    ],
)
def test_what_transformer_engine_and_the_flex_dispatcher_need(changes, message):
    args = good_arguments(transformer_impl="local", **changes)
    with pytest.raises(ValueError) as refused:
        check_megatron_arguments(args, HMoEConfig(), has_gpu=True)
    assert message in str(refused.value) and len(str(refused.value).splitlines()) == 1
    mended = {"transformer_impl": "transformer_engine", "bf16": True, "expert_model_parallel_size": 2}
    check_megatron_arguments(good_arguments(**(changes | mended)), HMoEConfig(), has_gpu=True)


@pytest.mark.parametrize(
    ("name", "value"), [("moe_router_score_function", "sigmoid"), ("moe_router_load_balancing_type", "sinkhorn")]
)
def test_losses_on_softmax_refuse_other_routers_and_their_absence_does_not(name, value):
    with pytest.raises(ValueError, match="set --hmoe-p-penalty-coeff 0"):
        check_megatron_arguments(good_arguments(**{name: value}), HMoEConfig())
    check_megatron_arguments(good_arguments(**{name: value}), HMoEConfig(p_penalty_coeff=0))


TOPP = HMoEConfig(router="topp", top_p=0.6)


def test_good_arguments_pass():
    check_megatron_arguments(good_arguments(), HMoEConfig())
    check_megatron_arguments(good_arguments(), TOPP)


@pytest.mark.parametrize(("name", "allowed", "given", "remedy"), [*REQUIRED, *REQUIRED_TOPP])
def test_each_megatron_flag_that_does_not_fit_is_refused(name, allowed, given, remedy):
    wrong = not next(iter(allowed)) if allowed <= {True, False} else "something else"
    with pytest.raises(ValueError) as refused:
        check_megatron_arguments(good_arguments(**{name: wrong}), TOPP)
    assert str(refused.value) == f"{given} ({name} = {wrong!r}): {remedy}"


def test_every_checked_flag_exists_in_megatron():
    """A rename in Megatron must not turn a check into one that looks at nothing."""
    from megatron.training.arguments import add_megatron_arguments

    parser = add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False))
    known = {action.dest for action in parser._actions}
    assert {name for name, *_ in (*REQUIRED, *REQUIRED_TOPP, *MET)} <= known


def test_all_problems_are_listed_not_the_first_only():
    args = good_arguments(
        num_layers=None,
        num_experts=None,
        enable_msc=True,
        recompute_granularity="selective",
        recompute_modules=["moe_act"],
    )
    with pytest.raises(ValueError) as refused:
        check_megatron_arguments(args, HMoEConfig())
    lines = str(refused.value).splitlines()
    assert len(lines) == 4
    assert "--num-layers is missing" in lines[0]
    assert "--num-experts is missing" in lines[1]
    assert "--enable-msc" in lines[2]
    assert "--recompute-modules moe_act" in lines[3]


@pytest.mark.parametrize(
    ("changes", "settings", "message"),
    [
        ({"moe_router_topk": 9}, HMoEConfig(), "--moe-router-topk 9 exceeds --num-experts 8"),
        (
            {},
            HMoEConfig(router="topp", top_p=0.6, max_experts_per_token=9),
            "--hmoe-max-experts-per-token 9 exceeds --num-experts 8",
        ),
    ],
)
def test_more_experts_a_token_than_there_are(changes, settings, message):
    with pytest.raises(ValueError, match=message):
        check_megatron_arguments(good_arguments(**changes), settings)


NO_MTP = {"mtp_num_layers": None, "mtp_use_repeated_layer": False}


def test_megatrons_width_is_the_mean_of_a_schedule():
    args = argparse.Namespace(num_layers=1, num_experts=4, moe_layer_freq=1, moe_ffn_hidden_size=40, **NO_MTP)
    assert widths_from_args(args, HMoEConfig(widths="arithmetic:1:4")) == {0: (16, 32, 48, 64)}
    assert widths_from_args(args, HMoEConfig(widths="equal")) == {0: (40,) * 4}
    with pytest.raises(ValueError, match="--moe-ffn-hidden-size 40 and --hmoe-total-width 160: .* remove one"):
        widths_from_args(args, HMoEConfig(widths="equal", total_width=160))


def test_widths_of_multi_token_prediction_layers_go_on():
    args = argparse.Namespace(num_layers=2, num_experts=2, moe_layer_freq=1, **NO_MTP | {"mtp_num_layers": 2})
    assert widths_from_args(args, HMoEConfig(widths="0-1=1,3;2=5,5;*=2,2")) == {
        0: (1, 3),
        1: (1, 3),
        2: (5, 5),
        3: (2, 2),
    }
    args.moe_layer_freq = [1, 0]  # they are as the last decoder layer
    assert widths_from_args(args, HMoEConfig(widths="2,2")) == {0: (2, 2)}


def test_widths_of_the_layers_that_hold_experts():
    args = argparse.Namespace(num_layers=4, num_experts=2, moe_layer_freq=[0, 1, 0, 1], **NO_MTP)
    config = HMoEConfig(widths="0-2=1,3;*=2,2")
    assert widths_from_args(args, config) == {1: (1, 3), 3: (2, 2)}
    with pytest.raises(ValueError, match="--moe-layer-freq .* names 4 layers, --num-layers is 5"):
        widths_from_args(argparse.Namespace(**(vars(args) | {"num_layers": 5})), config)


def test_as_many_experts_a_token_as_there_are():
    check_megatron_arguments(good_arguments(moe_router_topk=8), HMoEConfig())
    check_megatron_arguments(good_arguments(), HMoEConfig(router="topp", top_p=0.6, max_experts_per_token=8))


def test_each_loss_has_its_own_coefficient():
    settings = HMoEConfig(
        router="topp", top_p=0.6, p_penalty_coeff=0.2, load_balance_coeff=0.01, router_entropy_coeff=0.05
    )
    expected = {"p_penalty_loss": 0.2, "load_balance_loss": 0.01, "router_entropy_loss": 0.05}
    assert settings.loss_coeffs == expected


def test_flags_that_change_nothing_are_taken_out_and_said():
    given = {"moe_grouped_gemm": True, "verify_integrity": True, "moe_mlp_glu_interleave_size": 32}
    args = argparse.Namespace(**{name: instead for name, instead, _ in MET} | given)
    lines = met_flags(args)
    assert [line.split(" changes nothing: ")[0] for line in lines] == [
        "--moe-grouped-gemm",
        "--moe-mlp-glu-interleave-size",
        "--verify-integrity",
    ]
    assert all(getattr(args, name) == instead for name, instead, _ in MET) and met_flags(args) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"glu_linear_offset": 1.0, "bias_swiglu_fusion": True}, "--glu-linear-offset without --no-bias-swiglu-fusion"),
        (
            {"reset_attention_mask": True, "transformer_impl": "transformer_engine"},
            "--reset-attention-mask: Transformer Engine's causal attention takes no mask",
        ),
        (
            {"reset_attention_mask": True, "pipeline_model_parallel_size": 3, "world_size": 3},
            "--reset-attention-mask: only the first and the last pipeline stage have the mask",
        ),
        (
            {
                "reset_attention_mask": True,
                "pipeline_model_parallel_size": 2,
                "pipeline_model_parallel_layout": "Et|t|tL",
            },
            "--reset-attention-mask: only the first and the last pipeline stage have the mask",
        ),
        (
            {"mtp_num_layers": 1, "untie_embeddings_and_output_weights": False, "pipeline_model_parallel_size": 2}
            | {"save": "runs/a", "save_interval": 1, "recompute_method": None},
            "--mtp-num-layers over pipeline stages without --untie-embeddings-and-output-weights",
        ),
    ],
)
def test_what_megatron_would_ignore_or_fail_in_late(changes, message):
    with pytest.raises(ValueError, match=f"^{message}") as refused:
        check_megatron_arguments(good_arguments(**changes), HMoEConfig())
    assert len(str(refused.value).splitlines()) == 1


def test_the_page_of_megatrons_flags_is_up_to_date():
    page = Path(__file__).parents[2] / "docs" / "megatron_flags.md"
    assert page.read_text() == megatron_flags_document()
