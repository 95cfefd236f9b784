"""What of a run's settings belongs to its checkpoint, and how those of two runs differ. No torch."""

import argparse
import enum
import hashlib
from pathlib import Path
from typing import NamedTuple

from hmoe_megatron.files import sha256_file
from hmoe_megatron.flag_files import flag_named

MAX_SHOWN = 80  # characters of a value in a message

# Shapes and meaning of the weights: no checkpoint can go on with others, not even with --finetune.
_STRUCTURE = (
    "num_layers hidden_size num_attention_heads group_query_attention num_query_groups kv_channels normalization "
    "add_bias_linear add_qkv_bias qk_layernorm qk_l2_norm layernorm_zero_centered_gamma position_embedding_type "
    "rotary_interleaved untie_embeddings_and_output_weights num_experts moe_layer_freq moe_shared_expert_gate "
    "moe_shared_expert_intermediate_size moe_latent_size moe_router_enable_expert_bias tokenizer_type vocab_size "
    "swiglu squared_relu multi_latent_attention q_lora_rank kv_lora_rank qk_head_dim qk_pos_emb_head_dim v_head_dim "
    "attention_output_gate mtp_num_layers mtp_use_repeated_layer"
).split()
# The function that the weights compute.
_FUNCTION = (
    "layernorm_epsilon rotary_base rotary_percent use_rope_scaling rope_scaling_factor "
    "rotary_seq_len_interpolation_factor rope_type rotary_scaling_factor mscale mscale_all_dim beta_fast beta_slow "
    "original_max_position_embeddings window_size softmax_type no_rope_freq apply_residual_connection_post_layernorm "
    "activation_func_clamp_value glu_linear_offset"
).split()
# Of the moe_* and hmoe_* settings: how it is computed and where, what is printed and where to.
_FREE = (
    "moe_token_dispatcher_type moe_enable_deepep moe_flex_dispatcher_backend moe_deepep_num_sms moe_hybridep_num_sms "
    "moe_permute_fusion moe_router_fusion moe_shared_expert_overlap moe_layer_recompute moe_per_layer_logging "
    "moe_ffn_hidden_size moe_grouped_gemm moe_router_force_load_balancing moe_router_force_biased "
    "hmoe_widths hmoe_total_width hmoe_width_multiple hmoe_placement hmoe_max_cuts hmoe_cut_multiple hmoe_gemm_backend "
    "hmoe_keep_hidden hmoe_run_dir hmoe_skip_integrity hmoe_verify_data hmoe_max_failed_saves hmoe_default_signals "
    "hmoe_console hmoe_check_only hmoe_idle_expert_steps hmoe_replan_interval hmoe_replan_max_loss "
    "hmoe_replan_room no_save_optim"
).split()
_FREE_PREFIXES = (
    "moe_ncclep",
    "moe_routing_trace",
    "moe_paged_stash",
    "moe_hybridep",
    "moe_deepep",
    "moe_permute_fusion",
)
# How it is trained: may change at a resume, and is reported.
_TRAINING = (
    "moe_aux_loss_coeff moe_z_loss_coeff moe_input_jitter_eps moe_router_load_balancing_type "
    "moe_expert_capacity_factor moe_token_drop_policy "
    "moe_router_bias_update_rate moe_router_dtype moe_router_quantile_balancing_ema hmoe_p_penalty_coeff "
    "hmoe_router_entropy_coeff hmoe_load_balance_coeff"
).split()
# The form of the optimizer's state: under another it can't be read.
_OPTIMIZER = "optimizer bf16 fp16 use_distributed_optimizer use_precision_aware_optimizer".split()
_SCHEDULE = "lr min_lr lr_decay_style weight_decay_incr_style".split()


def model_settings(args: argparse.Namespace, widths: dict[int, tuple[int, ...]]) -> dict:
    """Name -> JSON value of what a resume is compared by: architecture, every MoE and HMoE setting, tokenizer, form of
    the optimizer's state, schedule.

    widths: decoder layer -> width of each logical expert, as laid out; not the flags that gave them.
    """
    named = [
        *_STRUCTURE,
        *_FUNCTION,
        *_OPTIMIZER,
        "no_save_optim",
        *sorted(name for name in vars(args) if name.startswith(("moe_", "hmoe_"))),
    ]
    settings = {name: plain(getattr(args, name)) for name in dict.fromkeys(named) if hasattr(args, name)}
    settings["expert_widths"] = {str(layer): list(widths_E) for layer, widths_E in widths.items()}
    settings["tokenizer_sha256"] = tokenizer_sha256(args)
    settings["schedule"] = schedule(args)
    return settings


def is_of_model(name: str) -> bool:
    """Whether an attribute of the arguments says what the model is and computes, or how its experts are trained."""
    is_free = name in _FREE or name.startswith(_FREE_PREFIXES)
    return name in (*_STRUCTURE, *_FUNCTION) or (name.startswith(("moe_", "hmoe_")) and not is_free)


def schedule(args: argparse.Namespace) -> dict:
    """Flag -> value of what Megatron's scheduler compares at a resume. It counts samples; steps are for people."""
    decays = "weight_decay" if args.weight_decay_incr_style == "constant" else "start_weight_decay end_weight_decay"
    found = {flag_named(name): getattr(args, name, None) for name in [*_SCHEDULE, *decays.split()]}
    length = getattr(args, "train_iters", None)
    if length:
        unit, batch, of_all = "iters", args.global_batch_size, length
    else:
        unit, batch, of_all = "samples", 1, getattr(args, "train_samples", None)
    decay = getattr(args, f"lr_decay_{unit}", None) or of_all
    warmup = getattr(args, f"lr_warmup_{unit}", None) or 0
    if getattr(args, "lr_warmup_fraction", None) is not None:
        warmup = args.lr_warmup_fraction * (decay or 0)
    for flag, steps in (("lr-decay", decay), ("lr-warmup", warmup), ("train", of_all)):
        if steps is not None:
            found[f"--{flag}-{unit}"] = f"{steps:g} x {batch} samples" if unit == "iters" else f"{steps:g} samples"
    return found


def plain(value):
    """The value as JSON has it."""
    if isinstance(value, dict):
        return {str(name): plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, enum.Enum):
        return value.name
    return value if isinstance(value, bool | int | float | str | type(None)) else str(value)


def tokenizer_sha256(args: argparse.Namespace) -> str | None:
    """SHA-256 over the tokenizer's files and their names; None for a tokenizer without files or of a hub's name."""
    paths = [getattr(args, name, None) for name in ("tokenizer_model", "vocab_file", "merge_file")]
    paths = [Path(path) for path in paths if path and Path(path).exists()]
    if not paths:
        return None
    entries = [entry for path in paths for entry in (sorted(path.rglob("*")) if path.is_dir() else [path])]
    files = [entry for entry in entries if entry.is_file()]
    if len(files) == 1:
        return sha256_file(files[0])
    listing = "".join(f"{file.name} {sha256_file(file)}\n" for file in files)
    return hashlib.sha256(listing.encode()).hexdigest()


class Differences(NamedTuple):
    """A phrase each: setting, saved value, value now. model: forbids to go on; optimizer: forbids to take the
    optimizer's state; schedule: what the user must decide; reported: only said."""

    model: list[str]
    optimizer: list[str]
    schedule: list[str]
    reported: list[str]


def differences(saved: dict, current: dict, finetune: bool = False) -> Differences:
    """finetune: weights only are taken, so what they compute may change. A setting that one side does not know is no
    difference: another version wrote it."""
    found = Differences([], [], [], [])
    for name in current:
        if name not in saved or name in _FREE or name.startswith(_FREE_PREFIXES) or saved[name] == current[name]:
            continue
        if name == "schedule":
            found.schedule.extend(
                _phrase(flag, saved[name].get(flag), value)
                for flag, value in current[name].items()
                if saved[name].get(flag) != value
            )
            continue
        structure = name in _STRUCTURE or name in ("expert_widths", "tokenizer_sha256")
        is_reported = name in _TRAINING or (finetune and not structure)
        kind = found.optimizer if name in _OPTIMIZER else found.reported if is_reported else found.model
        kind.append(_phrase(name, saved[name], current[name]))
    if saved.get("no_save_optim"):
        found.optimizer.append("there is none in the checkpoint")
    return found


def _phrase(name: str, saved, current) -> str:
    if name == "tokenizer_sha256":
        return f"tokenizer: SHA-256 {str(saved)[:12]} in the checkpoint, {str(current)[:12]} now (--tokenizer-model)"
    if name == "expert_widths" and isinstance(saved, dict) and saved.keys() == current.keys():
        layer = next(layer for layer in current if saved[layer] != current[layer])
        return _phrase(f"expert_widths of layer {layer} (--hmoe-widths)", saved[layer], current[layer])
    shown = name if " " in name or name.startswith("--") else flag_named(name)
    return f"{shown}: {_short(saved)} in the checkpoint, {_short(current)} now"


def _short(value) -> str:
    text = str(value)
    return text if len(text) <= MAX_SHOWN else text[: MAX_SHOWN - 3] + "..."
