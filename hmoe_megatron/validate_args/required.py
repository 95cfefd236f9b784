"""Settings of Megatron's that do not go with unequal experts, and what to do instead."""

from hmoe_megatron.flag_files import flag_named


def _row(name: str, allowed: set, remedy: str, given: str | None = None) -> tuple[str, set, str, str]:
    """(attribute of Megatron's arguments, values that work, what the user gave, why and what to do). True and False
    stand for a flag that is set or not."""
    return name, allowed, given or flag_named(name), remedy


_OFF, _UNSET = {False}, {None}
_UNPADDED = "experts compute in the model's own precision and need no rows added"
# Flags that ask for what is so in any case, or for what these experts do not need: (attribute, the value that Megatron
# gets in its place, why).
MET = (
    ("moe_grouped_gemm", False, "all experts of a rank are computed together, see --hmoe-gemm-backend"),
    ("moe_pad_expert_input_to_capacity", False, "experts take any number of rows, so none is added"),
    ("moe_router_padding_for_fp8", False, _UNPADDED),
    ("moe_router_padding_for_quantization", False, _UNPADDED),
    ("moe_mlp_glu_interleave_size", None, "the order of an expert's rows is its kernel's: gate above up"),
    ("verify_integrity", False, "every checkpoint has hashes, which a load compares"),
)
# What is refused: why, what it would take, and what to do instead.
REQUIRED = (
    _row(
        "swiglu",
        {True},
        "experts are SwiGLU as in the paper, and other forms need kernels of their own: add --swiglu",
        given="no --swiglu",
    ),
    _row(
        "add_bias_linear",
        _OFF,
        "experts have none, and a cut one would have to add its own once only: add --disable-bias-linear",
        given="biases in linear layers",
    ),
    _row(
        "moe_flex_dispatcher_backend",
        {"deepep", "hybridep"},
        "it has one buffer of a fixed number of rows a rank: use deepep or hybridep",
    ),
    _row("moe_use_upcycling", _OFF, "it copies one width to every expert: use tools/convert_checkpoint.py upcycle"),
    _row(
        "fp8_param_gather",
        _OFF,
        "routed experts have no FP8 weights, and it was never tried beside bf16 ones: remove it",
    ),
    _row(
        "optimizer",
        {"adam", "lion", "sgd"},
        "it treats a matrix as a whole, and pieces of cut experts would have to be gathered: use adam, sgd or lion",
    ),
    _row(
        "moe_expert_rank_capacity_factor",
        _UNSET,
        "it sizes a rank's buffer by Transformer Engine's grouped equal experts: use --moe-expert-capacity-factor",
    ),
    _row(
        "overlap_dispatch_backward_with_experts_wgrad",
        _OFF,
        "experts' weight gradients would have to be a node of their own: use --overlap-moe-expert-parallel-comm",
    ),
    _row(
        "delay_wgrad_compute",
        _OFF,
        "experts' weight gradients would have to be a node of their own: use --overlap-moe-expert-parallel-comm alone",
    ),
    _row(
        "expert_tensor_parallel_num_weight_shards",
        {None, 1},
        "it gathers weights of Transformer Engine's modules, and experts are none: remove it",
    ),
    _row(
        "tensor_parallel_num_weight_shards",
        {None, 1},
        "it changes the data-parallel groups that experts are reduced over, which was never tried: remove it",
    ),
    _row("hybrid_layer_pattern", _UNSET, "it builds Megatron's hybrid model, whose layers have no plan: remove it"),
    _row(
        "experimental_attention_variant",
        _UNSET,
        "Megatron builds it of Transformer Engine's layers only, and its parameters are not counted: remove it",
    ),
    _row("use_megatron_fsdp", _OFF, "it cuts weights without regard to experts: use --use-distributed-optimizer"),
    _row("use_torch_fsdp2", _OFF, "it cuts weights without regard to experts: use --use-distributed-optimizer"),
    _row(
        "heterogeneous_layers_config_path",
        _UNSET,
        "that is another kind of heterogeneity, without experts: give widths with --hmoe-widths",
    ),
    _row(
        "transformer_impl",
        {"local", "transformer_engine"},
        "it has no backward pass: use local or transformer_engine",
        given="--transformer-impl inference_optimized",
    ),
    _row(
        "ckpt_format",
        {"torch_dist"},
        "only torch_dist names experts, the others would load them into the wrong place: use torch_dist",
    ),
    _row(
        "non_persistent_ckpt_type",
        _UNSET,
        "its checkpoints are not checked at a load: use a small --save-interval with --save-retain-interval, and "
        "--async-save where saving takes long",
    ),
    _row("ckpt_convert_format", _UNSET, "there is one format, torch_dist: remove it"),
    _row("enable_msc", _OFF, "checkpoints come into place by a rename, in a file system: remove it"),
    _row(
        "fine_grained_activation_offloading",
        _OFF,
        "it hooks into modules that experts here do not have: use recomputation",
    ),
    _row("cuda_graph_impl", {None, "none"}, "rows of an expert change every step: remove it"),
)
REQUIRED_TOPP = (
    _row(
        "moe_router_load_balancing_type",
        {"aux_loss", "none"},
        "stock balancing divides by Top-K's K: use --hmoe-load-balance-coeff",
    ),
    _row("moe_aux_loss_coeff", {None, 0.0}, "the stock loss divides by Top-K's K: use --hmoe-load-balance-coeff"),
    _row("moe_router_score_function", {"softmax"}, "Top-P adds up probabilities: use softmax"),
    _row(
        "moe_router_enable_expert_bias",
        _OFF,
        "a biased score is no probability to add up: remove it, or use --hmoe-router topk",
    ),
    _row("moe_router_num_groups", _UNSET, "group-limited routing is Top-K's: remove it"),
    _row("moe_router_topk_scaling_factor", _UNSET, "it is Top-K's: remove it"),
    _row("moe_router_fusion", _OFF, "the fused router is Top-K's: remove it"),
    _row("moe_apply_probs_on_input", _OFF, "it is for one expert a token: remove it"),
    _row("moe_enable_routing_replay", _OFF, "it replays Top-K: remove it"),
)
# With a loss of HMoE's on, which are defined on the softmax over all experts.
REQUIRED_WITH_LOSSES = (
    _row(
        "moe_router_score_function",
        {"softmax"},
        "P-Penalty and load balance are defined on softmax: use it, or set --hmoe-p-penalty-coeff 0",
    ),
    _row(
        "moe_router_load_balancing_type",
        {"aux_loss", "global_aux_loss", "none", "seq_aux_loss"},
        "it balances by itself: set --hmoe-p-penalty-coeff 0",
    ),
)
