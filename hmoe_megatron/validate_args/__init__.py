"""What of Megatron's flags does not go with unequal experts, and what to do instead."""

import argparse
from importlib.util import find_spec

from hmoe_megatron.config import HMoEConfig
from hmoe_megatron.flag_files import flag_named
from hmoe_megatron.moe.slots import most_slots, slot2expert
from hmoe_megatron.validate_args.required import MET, REQUIRED, REQUIRED_TOPP, REQUIRED_WITH_LOSSES
from hmoe_megatron.validate_args.sizes import expert_tensor_parallel_size, layout_problems, number_problems

DEEPEP_MOST_SLOTS = 32  # of a token, over the expert-tensor-parallel ranks: a warp's lanes in DeepEP's kernels


def _unwrapped(value):
    """Megatron parses some flags to lists; one entry counts as itself."""
    return value[0] if isinstance(value, list) and len(value) == 1 else value


def met_flags(args: argparse.Namespace) -> list[str]:
    """Take the flags of MET out of ``args``; a line for each that was given: why it changes nothing."""
    given = [(name, instead, why) for name, instead, why in MET if getattr(args, name) not in (None, False)]
    for name, instead, _ in given:
        setattr(args, name, instead)
    return [f"{flag_named(name)} changes nothing: {why}" for name, _, why in given]


def check_megatron_arguments(args: argparse.Namespace, hmoe: HMoEConfig, has_gpu: bool = False) -> None:
    """Refuse what HMoE can't run, before any process group starts. ``has_gpu``: whether the run will use GPUs.

    Raises ValueError listing every problem with its remedy, not the first only.
    """
    problems = [*number_problems(args), *layout_problems(args)]
    if args.num_experts is None:
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
    if args.moe_apply_probs_on_input and hmoe.router == "topk" and args.moe_router_topk != 1:
        problems.append(
            f"--moe-apply-probs-on-input with --moe-router-topk {args.moe_router_topk}: it is for one expert a token: "
            "remove it, or use --moe-router-topk 1"
        )
    for name in ("activation_func_clamp_value", "glu_linear_offset"):
        if getattr(args, name) and args.bias_swiglu_fusion:
            problems.append(
                f"{flag_named(name)} without --no-bias-swiglu-fusion: Megatron's fused SwiGLU of dense layers and "
                "shared experts ignores it: add --no-bias-swiglu-fusion"
            )
    if args.recompute_granularity == "selective" and "moe_act" in (args.recompute_modules or ()):
        problems.append("--recompute-modules moe_act: it needs grouped experts; use moe (the whole layer) instead")
    if args.mtp_num_layers and args.recompute_method == "uniform" and args.recompute_num_layers != 1:
        problems.append(
            f"--mtp-num-layers with --recompute-num-layers {args.recompute_num_layers}: Megatron recomputes layers of "
            "multi-token prediction one by one only: use --recompute-num-layers 1, or --recompute-method block"
        )
    if hmoe.replan_interval:
        problems += _replan_problems(args)
    tied = not args.untie_embeddings_and_output_weights
    if args.mtp_num_layers and tied and args.pipeline_model_parallel_size > 1 and args.save:
        problems.append(
            "--mtp-num-layers over pipeline stages without --untie-embeddings-and-output-weights: Megatron 0.19.2 "
            "fails when it saves: add --untie-embeddings-and-output-weights"
        )
    if args.num_experts and (hmoe.max_experts_per_token or 0) > args.num_experts:
        problems.append(
            f"--hmoe-max-experts-per-token {hmoe.max_experts_per_token} exceeds --num-experts {args.num_experts}: "
            "lower it"
        )
    problems += [*_mask_problems(args), *_gpu_kernel_problems(args)]
    if problems:
        raise ValueError("\n".join(problems))


def _replan_problems(args):
    """Of --hmoe-replan-interval, whose moves know Megatron's own optimizers and what a dispatcher of any plan needs."""
    flag = "--hmoe-replan-interval"
    if args.expert_model_parallel_size < 2:
        yield f"{flag} needs --expert-model-parallel-size of 2 or more: with one rank nothing can move: remove it"
    if args.moe_token_dispatcher_type == "flex":
        yield f"{flag} with --moe-token-dispatcher-type flex: its buffers are of one plan: use alltoall"
    for name in ("use_precision_aware_optimizer", "optimizer_cpu_offload"):
        if getattr(args, name):
            yield f"{flag} with {flag_named(name)}: its state can't be moved yet: remove one of them"
    if args.num_distributed_optimizer_instances > 1:
        yield f"{flag} with --num-distributed-optimizer-instances above 1: it was never tried: remove one of them"


def _mask_problems(args):
    """Of what keeps the documents or conversations of a sequence apart by a mask."""
    flag = "--sft" if args.sft else "--reset-attention-mask"
    if not (args.sft or args.reset_attention_mask):
        return
    if args.transformer_impl == "transformer_engine":
        yield f"{flag}: Transformer Engine's causal attention takes no mask, and would ignore it: use local"
    virtual = (
        "num_virtual_stages_per_pipeline_rank num_layers_per_virtual_pipeline_stage pipeline_model_parallel_layout"
    )
    if args.pipeline_model_parallel_size > 2 or any(getattr(args, name) for name in virtual.split()):
        yield f"{flag}: only the first and the last pipeline stage have the mask: use two stages at most, none virtual"
    if args.sft:
        wrong = {"--tokenizer-type": args.tokenizer_type != "SFTTokenizer", "--mock-data": args.mock_data}
        wrong |= {"--reset-attention-mask": args.reset_attention_mask, "--reset-position-ids": args.reset_position_ids}
        if found := [name for name, is_wrong in wrong.items() if is_wrong]:
            yield f"--sft with {', '.join(found)}: it reads conversations, with --tokenizer-type SFTTokenizer"


def _gpu_kernel_problems(args):
    """What Transformer Engine's features and the flex dispatcher need, and Megatron would ignore or fail in late."""
    if args.transformer_impl == "local":
        for flag, wanted in (
            (f"--context-parallel-size {args.context_parallel_size}", args.context_parallel_size > 1),
            (f"--fp8-format {args.fp8}", args.fp8),
            (f"--fp4-format {args.fp4}", args.fp4),
            ("--use-te-activation-func", args.use_te_activation_func),
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
