"""What of Megatron's flags does not go with unequal experts, and what to do instead."""

import argparse
from importlib.util import find_spec

from hmoe_megatron.config import HMoEConfig
from hmoe_megatron.moe.slots import most_slots, slot2expert

# (attribute of Megatron's arguments, values that work, what the user gave, why and what to do).
# True and False stand for a flag that is set or not.
REQUIRED = (
    ("swiglu", {True}, "no --swiglu", "experts are SwiGLU as in the paper: add --swiglu"),
    ("add_bias_linear", {False}, "biases in linear layers", "experts have none: add --disable-bias-linear"),
    ("moe_ffn_hidden_size", {None}, "--moe-ffn-hidden-size", "widths come from --hmoe-widths: remove it"),
    ("moe_grouped_gemm", {False}, "--moe-grouped-gemm", "it needs equal widths: use --hmoe-gemm-backend"),
    (
        "moe_flex_dispatcher_backend",
        {"deepep", "hybridep"},
        "--moe-flex-dispatcher-backend",
        "it needs a capacity and grouped equal experts: use deepep or hybridep",
    ),
    (
        "moe_expert_capacity_factor",
        {None},
        "--moe-expert-capacity-factor",
        "one capacity for experts of different width is not defined: remove it (no token is dropped)",
    ),
    (
        "moe_pad_expert_input_to_capacity",
        {False},
        "--moe-pad-expert-input-to-capacity",
        "empty slots would be padded too: remove it",
    ),
    ("moe_latent_size", {None}, "--moe-latent-size", "not implemented for unequal experts: remove it"),
    ("moe_use_upcycling", {False}, "--moe-use-upcycling", "it copies one dense width to every expert: remove it"),
    ("moe_apply_probs_on_input", {False}, "--moe-apply-probs-on-input", "not implemented here: remove it"),
    (
        "mtp_num_layers",
        {None, 0},
        "--mtp-num-layers",
        "multi-token-prediction layers would be built with equal experts: remove it",
    ),
    (
        "fp8_param_gather",
        {False},
        "--fp8-param-gather",
        "experts have no FP8 weights (they compute in the model's own precision): remove it",
    ),
    ("fp4", {None}, "--fp4-format", "experts compute in bf16, fp16 or fp32: remove it"),
    (
        "optimizer",
        {"adam", "sgd", "lion"},
        "--optimizer",
        "it treats a matrix as a whole, and experts may be cut: use adam, sgd or lion",
    ),
    (
        "moe_router_padding_for_fp8",
        {False},
        "--moe-router-padding-for-fp8",
        "empty slots would be padded too: remove it",
    ),
    (
        "moe_router_padding_for_quantization",
        {False},
        "--moe-router-padding-for-quantization",
        "empty slots would be padded too: remove it",
    ),
    (
        "moe_expert_rank_capacity_factor",
        {None},
        "--moe-expert-rank-capacity-factor",
        "it counts on grouped equal experts: remove it",
    ),
    ("moe_paged_stash", {False}, "--moe-paged-stash", "it counts on grouped equal experts: remove it"),
    ("moe_mlp_glu_interleave_size", {None}, "--moe-mlp-glu-interleave-size", "experts keep gate above up: remove it"),
    (
        "overlap_dispatch_backward_with_experts_wgrad",
        {False},
        "--overlap-dispatch-backward-with-experts-wgrad",
        "not implemented for experts cut by width: remove it",
    ),
    (
        "expert_tensor_parallel_num_weight_shards",
        {None, 1},
        "--expert-tensor-parallel-num-weight-shards",
        "not implemented for unequal experts: remove it",
    ),
    (
        "tensor_parallel_num_weight_shards",
        {None, 1},
        "--tensor-parallel-num-weight-shards",
        "not implemented for unequal experts: remove it",
    ),
    ("hybrid_layer_pattern", {None}, "--hybrid-layer-pattern", "layers are attention and experts: remove it"),
    (
        "multi_latent_attention",
        {False},
        "--multi-latent-attention",
        "its parameters are not counted yet, so activated parameters would be wrong: remove it",
    ),
    (
        "experimental_attention_variant",
        {None},
        "--experimental-attention-variant",
        "its parameters are not counted yet, so activated parameters would be wrong: remove it",
    ),
    (
        "attention_output_gate",
        {False},
        "--attention-output-gate",
        "its parameters are not counted yet, so activated parameters would be wrong: remove it",
    ),
    (
        "overlap_moe_expert_parallel_comm",
        {False},
        "--overlap-moe-expert-parallel-comm",
        "the stock schedule knows equal experts only: remove it",
    ),
    ("delay_wgrad_compute", {False}, "--delay-wgrad-compute", "not implemented for experts cut by width: remove it"),
    ("use_megatron_fsdp", {False}, "--use-megatron-fsdp", "it shards by equal experts: use the distributed optimizer"),
    ("use_torch_fsdp2", {False}, "--use-torch-fsdp2", "it shards by equal experts: use the distributed optimizer"),
    (
        "heterogeneous_layers_config_path",
        {None},
        "--heterogeneous-layers-config-path",
        "that is another kind of heterogeneity: give widths with --hmoe-widths",
    ),
    (
        "transformer_impl",
        {"local", "transformer_engine"},
        "--transformer-impl inference_optimized",
        "training needs local or transformer_engine",
    ),
    ("spec", {None}, "--spec", "the layer spec is HMoE's own: remove it"),
    (
        "use_checkpoint_args",
        {False},
        "--use-checkpoint-args",
        "it knows no --hmoe-* flag: give the run's flags (run_arguments.json beside the checkpoint has them)",
    ),
    (
        "ckpt_format",
        {"torch_dist"},
        "--ckpt-format",
        "only torch_dist names experts, the others would load them into the wrong place: use torch_dist",
    ),
    (
        "verify_integrity",
        {False},
        "--verify-integrity",
        "its list names temporary files that are gone after saving, so that no run could load the checkpoint: remove "
        "it (every checkpoint has hashes, which a load checks)",
    ),
    (
        "non_persistent_ckpt_type",
        {None},
        "--non-persistent-ckpt-type",
        "its checkpoints are not checked at a load: save more often, with --async-save where that takes long",
    ),
    ("ckpt_convert_format", {None}, "--ckpt-convert-format", "there is one format, torch_dist: remove it"),
    (
        "use_mp_args_from_checkpoint_args",
        {False},
        "--use-mp-args-from-checkpoint-args",
        "it unpickles a checkpoint before it is checked: give the flags (any layout loads any other)",
    ),
    ("enable_msc", {False}, "--enable-msc", "checkpoints come into place by a rename, in a file system: remove it"),
    (
        "rerun_mode",
        {"disabled", "validate_results"},
        "--rerun-mode report_stats",
        "Megatron 0.19.2 fails in it: use validate_results or disabled",
    ),
    ("sft", {False}, "--sft", "batches are for pretraining: remove it"),
    ("perform_rl_step", {False}, "--perform-rl-step", "batches are for pretraining: remove it"),
    (
        "fine_grained_activation_offloading",
        {False},
        "--fine-grained-activation-offloading",
        "it hooks into modules that experts here do not have: remove it",
    ),
    ("yaml_cfg", {None}, "--yaml-cfg", "give the settings as flags"),
    ("cuda_graph_impl", {"none", None}, "--cuda-graph-impl", "rows of an expert change every step: remove it"),
    ("activation_func_clamp_value", {None}, "--activation-func-clamp-value", "not implemented for experts: remove it"),
    ("glu_linear_offset", {0.0, None}, "--glu-linear-offset", "not implemented for experts: remove it"),
    ("use_te_activation_func", {False}, "--use-te-activation-func", "not implemented for experts: remove it"),
)
REQUIRED_TOPP = (
    (
        "moe_router_load_balancing_type",
        {"none", "aux_loss"},
        "--moe-router-load-balancing-type",
        "stock balancing divides by Top-K's K: use --hmoe-load-balance-coeff",
    ),
    (
        "moe_aux_loss_coeff",
        {0.0, None},
        "--moe-aux-loss-coeff",
        "the stock loss divides by Top-K's K: use --hmoe-load-balance-coeff",
    ),
    (
        "moe_router_score_function",
        {"softmax"},
        "--moe-router-score-function",
        "Top-P adds up probabilities: use softmax",
    ),
    (
        "moe_router_enable_expert_bias",
        {False},
        "--moe-router-enable-expert-bias",
        "a biased score is no probability to add up: remove it, or use --hmoe-router topk",
    ),
    ("moe_router_num_groups", {None}, "--moe-router-num-groups", "group-limited routing is Top-K's: remove it"),
    ("moe_router_topk_scaling_factor", {None}, "--moe-router-topk-scaling-factor", "it is Top-K's: remove it"),
    ("moe_router_fusion", {False}, "--moe-router-fusion", "the fused router is Top-K's: remove it"),
    ("moe_enable_routing_replay", {False}, "--moe-enable-routing-replay", "it replays Top-K: remove it"),
)


# With a loss of HMoE's on, which are defined on the softmax over all experts.
REQUIRED_WITH_LOSSES = (
    (
        "moe_router_score_function",
        {"softmax"},
        "--moe-router-score-function",
        "P-Penalty and load balance are defined on softmax: use it, or set --hmoe-p-penalty-coeff 0",
    ),
    (
        "moe_router_load_balancing_type",
        {"none", "aux_loss", "seq_aux_loss", "global_aux_loss"},
        "--moe-router-load-balancing-type",
        "it balances by itself: set --hmoe-p-penalty-coeff 0",
    ),
)


DEEPEP_MOST_SLOTS = 32  # of a token, over the expert-tensor-parallel ranks: a warp's lanes in DeepEP's kernels


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
    required = REQUIRED
    if hmoe.router == "topp":
        required += REQUIRED_TOPP
    elif hmoe.loss_coeffs:
        required += REQUIRED_WITH_LOSSES
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
    if args.async_save and not args.use_persistent_ckpt_worker:
        problems.append("--async-save without --use-persistent-ckpt-worker: Megatron would save synchronously: add it")
    if args.async_save and args.async_strategy == "nvrx" and not find_spec("nvidia_resiliency_ext"):
        problems.append(
            "--async-save with --async-strategy nvrx, the default, and nvidia-resiliency-ext is not installed: install "
            "it, or use --async-strategy mcore"
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
    problems += _gpu_kernel_problems(args)
    if problems:
        raise ValueError("\n".join(problems))


def _gpu_kernel_problems(args):
    """What Transformer Engine's features and the flex dispatcher need, and Megatron would ignore or fail in late."""
    if args.transformer_impl == "local":
        for flag, wanted in (
            (f"--context-parallel-size {args.context_parallel_size}", args.context_parallel_size > 1),
            (f"--fp8-format {args.fp8}", args.fp8),
        ):
            if wanted:
                yield f"{flag} contradicts --transformer-impl local: use --transformer-impl transformer_engine"
    if "layernorm" in (args.recompute_modules or ()) and not find_spec("transformer_engine"):
        yield (
            "--recompute-modules layernorm: without Transformer Engine Megatron 0.19.2 fails in it (NameError: "
            "FP8GlobalStateManager): leave layernorm out"
        )
    if args.moe_token_dispatcher_type == "flex":
        if not args.bf16:
            yield "--moe-token-dispatcher-type flex without --bf16: DeepEP and HybridEP move bf16 only: add --bf16"
        if args.expert_model_parallel_size * expert_tensor_parallel_size(args) == 1:
            yield "--moe-token-dispatcher-type flex without expert parallelism: nothing is dispatched; use alltoall"


def pad_vocabulary(args: argparse.Namespace) -> None:
    """Round --padded-vocab-size up to a multiple of the tensor-parallel size, which Megatron takes as it is."""
    if args.padded_vocab_size:
        args.padded_vocab_size = round_up(args.padded_vocab_size, args.tensor_model_parallel_size)


def round_up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def expert_tensor_parallel_size(args: argparse.Namespace) -> int:
    """``--expert-tensor-parallel-size``, whose default is the size of tensor parallelism."""
    return args.expert_tensor_parallel_size or args.tensor_model_parallel_size


def check_dispatch(args: argparse.Namespace, layout) -> None:
    """Refuse a plan whose tokens fill more slots than DeepEP's kernels can move. ``layout``: ExpertLayout."""
    if args.moe_token_dispatcher_type != "flex" or args.moe_flex_dispatcher_backend != "deepep":
        return
    ranks = expert_tensor_parallel_size(args)
    for layer in layout.layers:
        slots = slot2expert(layout.pieces(layer), args.num_experts)
        most = ranks * most_slots(slots, args.num_experts, layout.settings, args.moe_router_topk)
        if most > DEEPEP_MOST_SLOTS:
            raise ValueError(
                f"--moe-flex-dispatcher-backend deepep: a token can fill {most} slots in layer {layer}, its kernels "
                f"move {DEEPEP_MOST_SLOTS} at most: use hybridep or alltoall, --hmoe-max-experts-per-token, or "
                "--hmoe-max-cuts 0"
            )
