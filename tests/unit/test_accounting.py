"""Reports count the real widths: parameters against a built model, FLOPs against Megatron's own formula."""

import argparse

import pytest

from hmoe_megatron.config import HMoEConfig
from hmoe_megatron.telemetry.accounting import expected_active_width, parameter_counts
from tests.distributed.ranks import run_ranks
from tests.distributed.training_run import TINY, build

WIDTHS = "16,32,48,64"
LATENT = (
    "--multi-latent-attention --kv-lora-rank 20 --qk-head-dim 8 --qk-pos-emb-head-dim 4 --v-head-dim 8 --rope-type rope"
)
VARIANTS = {
    "plain": "",
    "tied embeddings": "tied",
    "grouped queries, qkv bias, qk norm": "--group-query-attention --num-query-groups 2 --add-qkv-bias --qk-layernorm",
    "layer norm, a dense layer": "--normalization LayerNorm --moe-layer-freq [0,1] --ffn-hidden-size 40",
    "shared expert with gate": "--moe-shared-expert-intermediate-size 24 --moe-shared-expert-gate",
    "experts of a latent size": "--moe-latent-size 16 --moe-shared-expert-intermediate-size 24",
    "latent attention": f"{LATENT} --q-lora-rank 12 --qk-layernorm",
    "latent attention, queries as they are": f"{LATENT} --normalization LayerNorm",
    "attention with a gate": "--attention-output-gate",
    "two tokens more are predicted": "--mtp-num-layers 2",
    "learned positions": "--position-embedding-type learned_absolute",
}


def count_and_build(flags):
    """(counted, built) parameters of the model of TINY and ``flags``."""
    argv = [*TINY, "--hmoe-widths", WIDTHS, *flags.split()]
    if "tied" in argv:
        argv = [word for word in argv if word not in ("tied", "--untie-embeddings-and-output-weights")]
    args, layout, model = build(argv)
    built = {name: parameter.numel() for name, parameter in model.named_parameters()}
    experts = sum(count for name, count in built.items() if ".experts." in name)
    counted = parameter_counts(args, layout.widths)
    return counted, (sum(built.values()) - experts, experts)


@pytest.mark.parametrize("variant", VARIANTS)
def test_counted_parameters_are_those_of_the_built_model(variant):
    ((counted, (always_active, experts)),) = run_ranks(1, count_and_build, VARIANTS[variant])
    assert (counted.always_active, counted.experts) == (always_active, experts)
    assert counted.total == always_active + experts


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (HMoEConfig(), 2 * 40),
        (HMoEConfig(router="topp", top_p=0.6), 3 * 40),  # the fewest of 4 equal probabilities that reach 0.6
        (HMoEConfig(router="topp", top_p=0.5), 2 * 40),
        (HMoEConfig(router="topp", top_p=0.6, max_experts_per_token=1), 1 * 40),
    ],
)
def test_expected_active_width_under_uniform_routing(settings, expected):
    assert expected_active_width(settings, 2, (16, 32, 48, 64)) == expected


def flops_of(width_and_topk, active_width):
    """(Megatron's FLOPs as patched, Megatron's own for one width and Top-K) of one batch."""
    from megatron.training import training

    from hmoe_megatron.telemetry.accounting import report_real_widths
    from hmoe_megatron.training import parse_arguments

    args, layout, _ = parse_arguments([*TINY, "--hmoe-widths", WIDTHS])
    args.padded_vocab_size = 128
    stock_args = argparse.Namespace(**vars(args))
    stock_args.moe_ffn_hidden_size, stock_args.moe_router_topk = width_and_topk
    stock = training.num_floating_point_operations(stock_args, 8)
    before = vars(args).copy()
    report_real_widths(layout.widths, lambda: active_width)
    ours = training.num_floating_point_operations(args, 8)
    assert vars(args) == before, "a report must not change the run's arguments"
    memory = training.report_theoretical_memory(args, num_microbatches=1)
    return ours, stock, memory


def test_flops_use_the_measured_activated_width():
    ((ours, stock, _),) = run_ranks(1, flops_of, (40, 2), 80.0)
    assert ours == stock, "an activated width of 80 is two experts of 40"
    ((more, _, memory),) = run_ranks(1, flops_of, (40, 2), 90.0)
    tokens, layers, hidden = 8 * 16, 2, 32
    assert more - ours == pytest.approx(18 * tokens * layers * hidden * 10)  # 6 a parameter, three products
    assert memory[0] > 0
