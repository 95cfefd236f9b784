"""The settings HMoE adds to Megatron's: one frozen dataclass, its flags, and the checks against Megatron's flags."""

import argparse
import dataclasses
import math
import typing

from hmoe_megatron.widths import layer_widths

PAPER_P_PENALTY_COEFF = 0.1
PAPER_ROUTER_ENTROPY_COEFF = 0.03


def _setting(default, help_text: str, choices: tuple[str, ...] | None = None):
    return dataclasses.field(default=default, metadata={"help": help_text, "choices": choices})


@dataclasses.dataclass(frozen=True)
class HMoEConfig:
    """What the user says with ``--hmoe-*``. Every field is one flag; its help text is the flag's."""

    widths: str = _setting(
        "arithmetic:9:23",
        "FFN widths of the experts of a layer: arithmetic:FIRST:LAST, geometric:RATIO, hybrid:1,1,2,4 or equal "
        "(ratios, scaled to --hmoe-total-width), or the widths themselves as 864,1056,... Layers (from 0) may "
        "differ: '0-3=arithmetic:9:23;*=equal'.",
    )
    total_width: int | None = _setting(None, "Sum of the expert widths of one layer; ratios are scaled to it.")
    width_multiple: int | None = _setting(
        None, "Round every width to a multiple of this, keeping the sum. Off unless given; 128 suits GPU tiles."
    )
    router: str = _setting(
        "topk",
        "topk: --moe-router-topk experts a token. topp: the fewest experts whose probability reaches --hmoe-top-p.",
        ("topk", "topp"),
    )
    top_p: float | None = _setting(None, "Probability that the experts of a token must reach (paper: 0.6). topp only.")
    max_experts_per_token: int | None = _setting(None, "Most experts a token may use. topp only; default: all.")
    p_penalty_coeff: float = _setting(
        PAPER_P_PENALTY_COEFF,
        "Coefficient of the P-Penalty N * sum_i M_i Phat_i, M_i = tokens of expert i / T * width_i / mean width. "
        "As in the paper it is not divided by the experts a token: at equal widths with Top-K it is K times "
        "Megatron's --moe-aux-loss-coeff.",
    )
    router_entropy_coeff: float | None = _setting(
        None,
        "Coefficient of the router's mean entropy -sum_i P_i log P_i (natural logarithm). topp only; default "
        f"{PAPER_ROUTER_ENTROPY_COEFF} with topp. Positive values sharpen the routing.",
    )
    load_balance_coeff: float = _setting(
        0.0,
        "Coefficient of the paper's load-balance loss N * sum_i T_i Phat_i (baseline: 0.01). Not divided by the "
        "experts a token: with Top-K it is K times Megatron's --moe-aux-loss-coeff.",
    )
    placement: str = _setting(
        "auto",
        "Where experts live on the expert-parallel ranks: auto (FLOPs balanced, experts cut by width where one is "
        "the bottleneck), contiguous (whole experts in order, as Megatron), or a plan file (.json).",
    )
    max_cuts: int | None = _setting(
        None, "Most cuts a layer that --hmoe-placement auto may make; default: ranks - 1. 0: whole experts only."
    )
    cut_multiple: int = _setting(16, "Experts are cut at multiples of this width (--hmoe-placement auto).")
    gemm_backend: str = _setting(
        "auto",
        "Compute of the experts: reference (Megatron's linear layers, one expert at a time), cpu (one autograd node "
        "a layer, bf16 computed in fp32; for machines without a GPU), auto (cpu without a GPU, else reference).",
        ("auto", "reference", "cpu"),
    )
    run_dir: str | None = _setting(
        None, "Directory for the placement plan and telemetry.jsonl; default: --save, without it nothing is written."
    )

    def __post_init__(self):
        problems = list(self._problems())
        if problems:
            raise ValueError("\n".join(problems))

    def _problems(self):
        for name in ("p_penalty_coeff", "load_balance_coeff", "router_entropy_coeff"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value >= 0):
                yield f"{_flag(name)} {value}: give a finite number, 0 or more (0 turns the loss off)"
        for name in ("total_width", "width_multiple", "max_experts_per_token", "cut_multiple"):
            value = getattr(self, name)
            if value is not None and value < 1:
                yield f"{_flag(name)} {value}: give a whole number of at least 1"
        if self.max_cuts is not None and self.max_cuts < 0:
            yield f"--hmoe-max-cuts {self.max_cuts}: give 0 or more"
        if self.top_p is not None and not 0 < self.top_p <= 1:
            yield f"--hmoe-top-p {self.top_p}: give a probability above 0, at most 1"
        if self.router == "topp" and self.top_p is None:
            yield "--hmoe-router topp needs --hmoe-top-p (the paper uses 0.6)"
        if self.router == "topk":
            for name in ("top_p", "max_experts_per_token"):
                if getattr(self, name) is not None:
                    yield f"{_flag(name)} {getattr(self, name)} has no effect with --hmoe-router topk: " \
                          f"remove it, or use --hmoe-router topp"
            if self.router_entropy_coeff:
                yield f"--hmoe-router-entropy-coeff {self.router_entropy_coeff} contradicts --hmoe-router topk: the " \
                      "entropy loss limits how many experts Top-P uses; remove it, or use --hmoe-router topp"
        if self.placement not in ("auto", "contiguous"):
            if not self.placement.endswith(".json"):
                yield f"--hmoe-placement {self.placement!r}: give auto, contiguous, or the path of a plan file (.json)"
            if self.max_cuts is not None:
                yield f"--hmoe-max-cuts {self.max_cuts} contradicts --hmoe-placement {self.placement}: " \
                      "a plan file already says where experts are cut; remove one of them"
        elif self.placement == "contiguous" and self.max_cuts:
            yield f"--hmoe-max-cuts {self.max_cuts} contradicts --hmoe-placement contiguous, which cuts nothing: " \
                  "remove it, or use --hmoe-placement auto"

    @property
    def entropy_coeff(self) -> float:
        """Coefficient of the router entropy in force: the paper's with Top-P, none with Top-K."""
        if self.router_entropy_coeff is not None:
            return self.router_entropy_coeff
        return PAPER_ROUTER_ENTROPY_COEFF if self.router == "topp" else 0.0


def _flag(name: str) -> str:
    return "--hmoe-" + name.replace("_", "-")


class _Help(argparse.HelpFormatter):
    """Some of Megatron 0.19.2's help texts hold a bare %, at which argparse raises: show those as they are."""

    def _expand_help(self, action):
        try:
            return super()._expand_help(action)
        except (ValueError, TypeError):
            return action.help


def add_hmoe_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add one ``--hmoe-*`` flag for each field of HMoEConfig (Megatron's ``extra_args_provider``)."""
    parser.formatter_class = _Help
    group = parser.add_argument_group("hmoe", "heterogeneous mixture of experts")
    hints = typing.get_type_hints(HMoEConfig)
    for field in dataclasses.fields(HMoEConfig):
        kind = next(t for t in (typing.get_args(hints[field.name]) or (hints[field.name],)) if t is not type(None))
        group.add_argument(
            _flag(field.name),
            dest=f"hmoe_{field.name}",
            type=kind,
            default=field.default,
            choices=field.metadata["choices"],
            help=field.metadata["help"].replace("%", "%%"),
        )
    return parser


def hmoe_config_from_args(args: argparse.Namespace) -> HMoEConfig:
    """HMoEConfig of parsed arguments. Raises ValueError with every contradiction among the ``--hmoe-*`` flags."""
    return HMoEConfig(**{f.name: getattr(args, f"hmoe_{f.name}") for f in dataclasses.fields(HMoEConfig)})


def moe_layers(args: argparse.Namespace) -> list[int]:
    """Decoder layers (from 0) that hold experts, by ``--moe-layer-freq``."""
    freq = args.moe_layer_freq
    if isinstance(freq, int):
        return [i for i in range(args.num_layers) if i % freq == 0]
    if len(freq) != args.num_layers:
        raise ValueError(
            f"--moe-layer-freq {freq} names {len(freq)} layers, --num-layers is {args.num_layers}: "
            "give one entry a layer"
        )
    return [i for i, is_moe in enumerate(freq) if is_moe]


def widths_from_args(args: argparse.Namespace, hmoe: HMoEConfig) -> dict[int, tuple[int, ...]]:
    """Widths of the experts of each MoE layer: decoder layer (from 0) -> width of each logical expert."""
    widths_LE = layer_widths(hmoe.widths, args.num_layers, args.num_experts, hmoe.total_width, hmoe.width_multiple)
    return {layer: tuple(widths_LE[layer]) for layer in moe_layers(args)}


# (attribute of Megatron's arguments, values that work, what the user gave, why and what to do).
# True and False stand for a flag that is set or not.
_REQUIRED = (
    ("swiglu", {True}, "no --swiglu", "experts are SwiGLU as in the paper: add --swiglu"),
    ("add_bias_linear", {False}, "biases in linear layers", "experts have none: add --disable-bias-linear"),
    ("moe_ffn_hidden_size", {None}, "--moe-ffn-hidden-size", "widths come from --hmoe-widths: remove it"),
    ("moe_grouped_gemm", {False}, "--moe-grouped-gemm", "it needs equal widths: use --hmoe-gemm-backend"),
    ("moe_token_dispatcher_type", {"alltoall", "allgather"}, "--moe-token-dispatcher-type flex",
     "it counts on equal slots: use alltoall or allgather"),
    ("moe_expert_capacity_factor", {None}, "--moe-expert-capacity-factor",
     "one capacity for experts of different width is not defined: remove it (no token is dropped)"),
    ("moe_pad_expert_input_to_capacity", {False}, "--moe-pad-expert-input-to-capacity",
     "empty slots would be padded too: remove it"),
    ("moe_latent_size", {None}, "--moe-latent-size", "not implemented for unequal experts: remove it"),
    ("moe_use_upcycling", {False}, "--moe-use-upcycling", "it copies one dense width to every expert: remove it"),
    ("moe_apply_probs_on_input", {False}, "--moe-apply-probs-on-input", "not implemented here: remove it"),
    ("mtp_num_layers", {None, 0}, "--mtp-num-layers",
     "multi-token-prediction layers would be built with equal experts: remove it"),
    ("fp8", {None}, "--fp8-format", "experts compute in bf16, fp16 or fp32: remove it"),
    ("fp4", {None}, "--fp4-format", "experts compute in bf16, fp16 or fp32: remove it"),
    ("optimizer", {"adam", "sgd", "lion"}, "--optimizer",
     "it treats a matrix as a whole, and experts may be cut: use adam, sgd or lion"),
    ("moe_router_padding_for_quantization", {False}, "--moe-router-padding-for-quantization",
     "empty slots would be padded too: remove it"),
    ("moe_expert_rank_capacity_factor", {None}, "--moe-expert-rank-capacity-factor",
     "it counts on grouped equal experts: remove it"),
    ("moe_paged_stash", {False}, "--moe-paged-stash", "it counts on grouped equal experts: remove it"),
    ("moe_mlp_glu_interleave_size", {None}, "--moe-mlp-glu-interleave-size",
     "experts keep gate above up: remove it"),
    ("overlap_dispatch_backward_with_experts_wgrad", {False}, "--overlap-dispatch-backward-with-experts-wgrad",
     "not implemented for experts cut by width: remove it"),
    ("expert_tensor_parallel_num_weight_shards", {None, 1}, "--expert-tensor-parallel-num-weight-shards",
     "not implemented for unequal experts: remove it"),
    ("tensor_parallel_num_weight_shards", {None, 1}, "--tensor-parallel-num-weight-shards",
     "not implemented for unequal experts: remove it"),
    ("hybrid_layer_pattern", {None}, "--hybrid-layer-pattern", "layers are attention and experts: remove it"),
    ("multi_latent_attention", {False}, "--multi-latent-attention",
     "its parameters are not counted yet, so activated parameters would be wrong: remove it"),
    ("experimental_attention_variant", {None}, "--experimental-attention-variant",
     "its parameters are not counted yet, so activated parameters would be wrong: remove it"),
    ("attention_output_gate", {False}, "--attention-output-gate",
     "its parameters are not counted yet, so activated parameters would be wrong: remove it"),
    ("overlap_moe_expert_parallel_comm", {False}, "--overlap-moe-expert-parallel-comm",
     "the stock schedule knows equal experts only: remove it"),
    ("delay_wgrad_compute", {False}, "--delay-wgrad-compute", "not implemented for experts cut by width: remove it"),
    ("use_megatron_fsdp", {False}, "--use-megatron-fsdp", "it shards by equal experts: use the distributed optimizer"),
    ("use_torch_fsdp2", {False}, "--use-torch-fsdp2", "it shards by equal experts: use the distributed optimizer"),
    ("heterogeneous_layers_config_path", {None}, "--heterogeneous-layers-config-path",
     "that is another kind of heterogeneity: give widths with --hmoe-widths"),
    ("transformer_impl", {"local", "transformer_engine"}, "--transformer-impl inference_optimized",
     "training needs local or transformer_engine"),
    ("spec", {None}, "--spec", "the layer spec is HMoE's own: remove it"),
    ("use_checkpoint_args", {False}, "--use-checkpoint-args",
     "it knows no --hmoe-* flag: give the run's flags (run_arguments.json beside the checkpoint has them)"),
    ("ckpt_format", {"torch_dist"}, "--ckpt-format",
     "only torch_dist names experts, the others would load them into the wrong place: use torch_dist"),
    ("sft", {False}, "--sft", "batches are for pretraining: remove it"),
    ("perform_rl_step", {False}, "--perform-rl-step", "batches are for pretraining: remove it"),
    ("fine_grained_activation_offloading", {False}, "--fine-grained-activation-offloading",
     "it hooks into modules that experts here do not have: remove it"),
    ("yaml_cfg", {None}, "--yaml-cfg", "give the settings as flags"),
    ("cuda_graph_impl", {"none", None}, "--cuda-graph-impl", "rows of an expert change every step: remove it"),
    ("activation_func_clamp_value", {None}, "--activation-func-clamp-value", "not implemented for experts: remove it"),
    ("glu_linear_offset", {0.0, None}, "--glu-linear-offset", "not implemented for experts: remove it"),
    ("use_te_activation_func", {False}, "--use-te-activation-func", "not implemented for experts: remove it"),
)
_REQUIRED_TOPP = (
    ("moe_router_load_balancing_type", {"none", "aux_loss"}, "--moe-router-load-balancing-type",
     "stock balancing divides by Top-K's K: use --hmoe-load-balance-coeff"),
    ("moe_aux_loss_coeff", {0.0, None}, "--moe-aux-loss-coeff",
     "the stock loss divides by Top-K's K: use --hmoe-load-balance-coeff"),
    ("moe_router_score_function", {"softmax"}, "--moe-router-score-function",
     "Top-P adds up probabilities: use softmax"),
    ("moe_router_enable_expert_bias", {False}, "--moe-router-enable-expert-bias",
     "a biased score is no probability to add up: remove it, or use --hmoe-router topk"),
    ("moe_router_num_groups", {None}, "--moe-router-num-groups", "group-limited routing is Top-K's: remove it"),
    ("moe_router_topk_scaling_factor", {None}, "--moe-router-topk-scaling-factor", "it is Top-K's: remove it"),
    ("moe_router_fusion", {False}, "--moe-router-fusion", "the fused router is Top-K's: remove it"),
    ("moe_enable_routing_replay", {False}, "--moe-enable-routing-replay", "it replays Top-K: remove it"),
)


# With a loss of HMoE's on, which are defined on the softmax over all experts.
_REQUIRED_WITH_LOSSES = (
    ("moe_router_score_function", {"softmax"}, "--moe-router-score-function",
     "P-Penalty and load balance are defined on softmax: use it, or set --hmoe-p-penalty-coeff 0"),
    ("moe_router_load_balancing_type", {"none", "aux_loss", "seq_aux_loss", "global_aux_loss"},
     "--moe-router-load-balancing-type", "it balances by itself: set --hmoe-p-penalty-coeff 0"),
)


def _unwrapped(value):
    """Megatron parses some flags to lists; one entry counts as itself."""
    return value[0] if isinstance(value, list) and len(value) == 1 else value


def check_megatron_arguments(args: argparse.Namespace, hmoe: HMoEConfig, has_gpu: bool = False) -> None:
    """Refuse what HMoE can't run, before any process group starts. ``has_gpu``: whether the run will use GPUs.

    Raises ValueError listing every problem with its remedy, not the first only.
    """
    problems = []
    for name in ("num_layers", "hidden_size", "num_attention_heads", "seq_length", "micro_batch_size"):
        if getattr(args, name) is None:
            problems.append(f"--{name.replace('_', '-')} is missing: give it")
    if not args.num_experts:
        problems.append("--num-experts is missing: give the number of logical experts of a layer (the paper uses 8)")
    required = _REQUIRED
    if hmoe.router == "topp":
        required += _REQUIRED_TOPP
    elif hmoe.p_penalty_coeff or hmoe.load_balance_coeff:
        required += _REQUIRED_WITH_LOSSES
    for name, allowed, given, remedy in required:
        value = _unwrapped(getattr(args, name, None))
        if not hasattr(args, name) or (isinstance(value, list) or value not in allowed):
            problems.append(f"{given} ({name} = {value!r}): {remedy}")
    if has_gpu and hmoe.router == "topp" and args.deterministic_mode:
        problems.append(
            "--deterministic-mode contradicts --hmoe-router topp on a GPU, where torch has no deterministic cumulative "
            "sum of floats: remove it, or use --hmoe-router topk"
        )
    if args.eval_interval is None:
        problems.append("--eval-interval is missing: give it (Megatron counts the validation samples by it)")
    if args.use_distributed_optimizer and not args.dist_ckpt_optim_fully_reshardable:
        problems.append(
            "--use-distributed-optimizer without --dist-ckpt-optim-fully-reshardable: in Megatron's default format a "
            "resume without Transformer Engine is wrong in silence, and one under another plan always: add the flag"
        )
    if args.num_experts and hmoe.router == "topk" and args.moe_router_topk > args.num_experts:
        problems.append(f"--moe-router-topk {args.moe_router_topk} exceeds --num-experts {args.num_experts}: lower it")
    if args.recompute_granularity == "selective" and "moe_act" in (args.recompute_modules or ()):
        problems.append("--recompute-modules moe_act: it needs grouped experts; use moe (the whole layer) instead")
    if args.num_experts and (hmoe.max_experts_per_token or 0) > args.num_experts:
        problems.append(
            f"--hmoe-max-experts-per-token {hmoe.max_experts_per_token} exceeds --num-experts {args.num_experts}: "
            "lower it"
        )
    if problems:
        raise ValueError("\n".join(problems))


def flags_document() -> str:
    """docs/flags.md: every ``--hmoe-*`` flag with its default, from HMoEConfig."""
    lines = ["# `--hmoe-*` flags", "", "Made by `python -m hmoe_megatron.config > docs/flags.md`.", ""]
    for field in dataclasses.fields(HMoEConfig):
        default = "not set" if field.default is None else f"`{field.default}`"
        lines += [f"## `{_flag(field.name)}`", f"{field.metadata['help']} Default: {default}.", ""]
    return "\n".join(lines)


if __name__ == "__main__":
    print(flags_document(), end="")
