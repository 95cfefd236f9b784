"""Settings of Megatron's that do not go with unequal experts, and what to do instead."""

# (attribute of Megatron's arguments, values that work, what the user gave, why and what to do).
# True and False stand for a flag that is set or not.
REQUIRED = (
    ("swiglu", {True}, "no --swiglu", "experts are SwiGLU as in the paper: add --swiglu"),
    ("add_bias_linear", {False}, "biases in linear layers", "experts have none: add --disable-bias-linear"),
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
        "experimental_attention_variant",
        {None},
        "--experimental-attention-variant",
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
    ("moe_apply_probs_on_input", {False}, "--moe-apply-probs-on-input", "it is for one expert a token: remove it"),
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
