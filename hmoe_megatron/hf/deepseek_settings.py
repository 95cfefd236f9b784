"""What a DeepSeek-V3 has that other models lack: latent attention, a sigmoid router with groups and a bias, a shared
expert, layers that predict one more token each (arXiv 2412.19437)."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields

# Of the norms of latent vectors in transformers' DeepseekV3, whatever rms_norm_eps is; Megatron has one for all.
NORM_EPS = 1e-6
# Settings of a checkpoint that transformers' DeepseekV3 computes, where they are not those of other models; () is any.
EXPORTED = {
    "multi_latent_attention": (True,),
    "moe_router_score_function": ("sigmoid",),
    "moe_router_enable_expert_bias": (True,),
    "mtp_num_layers": (),
    "moe_router_num_groups": (),
    "moe_router_group_topk": (),
    "moe_shared_expert_intermediate_size": (),
}
# Of YaRN; Megatron-Core 0.19.2 has no flags for them.
_YARN = {"original_max_position_embeddings": 4096, "beta_fast": 32, "beta_slow": 1}
_THEIRS = {
    "q_lora_rank": "q_lora_rank",
    "kv_lora_rank": "kv_lora_rank",
    "qk_head_dim": "qk_nope_head_dim",
    "qk_pos_emb_head_dim": "qk_rope_head_dim",
    "v_head_dim": "v_head_dim",
}


@dataclass(frozen=True)
class DeepSeek:
    """Megatron's settings of these names. Both of the groups are None where every expert may be chosen."""

    q_lora_rank: int | None
    kv_lora_rank: int
    qk_head_dim: int
    qk_pos_emb_head_dim: int
    v_head_dim: int
    rope_type: str
    rotary_scaling_factor: float
    mscale: float
    mscale_all_dim: float
    moe_router_num_groups: int | None
    moe_router_group_topk: int | None
    moe_shared_expert_intermediate_size: int | None
    mtp_num_layers: int

    @classmethod
    def of(cls, settings: Mapping) -> "DeepSeek":
        """Of a checkpoint's settings, or of those that `from_config` collects."""
        found = {field.name: settings[field.name] for field in fields(cls)}
        groups, chosen = found["moe_router_num_groups"], found["moe_router_group_topk"]
        if not chosen or chosen == groups:
            found |= {"moe_router_num_groups": None, "moe_router_group_topk": None}
        found["rope_type"] = found["rope_type"] or "yarn"  # Megatron's default for latent attention
        found["mtp_num_layers"] = found["mtp_num_layers"] or 0
        return cls(**found)

    def sizes(self) -> dict[str, int]:
        """What must be a size."""
        optional = ("q_lora_rank", "moe_router_num_groups", "moe_router_group_topk")
        found = {name: getattr(self, name) for name in (*_THEIRS, *optional, "moe_shared_expert_intermediate_size")}
        return {name: size for name, size in found.items() if size is not None or name not in optional}

    def numbers(self) -> dict[str, float]:
        """Of YaRN."""
        return {name: getattr(self, name) for name in ("rotary_scaling_factor", "mscale", "mscale_all_dim")}

    def problems(self, experts: int, chosen: int) -> dict[str, bool]:
        """What Megatron and transformers compute differently -> whether this model has it; experts a layer, experts
        chosen."""
        groups, kept, is_yarn = self.moe_router_num_groups or 1, self.moe_router_group_topk, self.rope_type == "yarn"
        is_scaled = self.mscale_all_dim != 0 and self.rotary_scaling_factor > 1
        # transformers' factor of cosine and sine, without both numbers, is that of mscale 1.
        same_mscale = (self.mscale and self.mscale_all_dim) or (self.mscale, self.mscale_all_dim) == (1, 0)
        return {
            # Megatron-Core 0.19.2 gives them one more norm with Transformer Engine, and builds none without.
            "queries without --q-lora-rank": self.q_lora_rank is None,
            # Megatron's score of a group is the sum of its K / M best, for M groups a token; transformers' of two.
            "--moe-router-group-topk other than half of --moe-router-topk": kept is not None and chosen != 2 * kept,
            "groups of experts that are one, or unequal": experts % groups != 0 or experts // groups < 2,
            # Megatron scales the softmax by it without yarn too.
            "--mscale-all-dim with --rope-type rope": is_scaled and not is_yarn,
            "such a pair of --mscale and --mscale-all-dim": is_yarn and not same_mscale,
            "--rotary-scaling-factor under 1": is_yarn and self.rotary_scaling_factor < 1,
            "an odd --qk-pos-emb-head-dim": self.qk_pos_emb_head_dim % 2 == 1,
        }

    def flags(self) -> dict[str, object]:
        """Of pretrain_hmoe.py, but for switches."""
        left_out = self.numbers() if self.rope_type == "rope" else ()
        kept = {name: value for name, value in asdict(self).items() if value and name not in left_out}
        return {name.replace("_", "-"): value for name, value in kept.items()} | {
            "kv-channels": self.v_head_dim,
            "moe-router-score-function": "sigmoid",
        }

    def config(self, theta: float, shared_experts: int) -> dict:
        """Its part of config.json. shared_experts: widths of an expert that the shared one takes."""
        rope = {"rope_type": "default", "rope_theta": theta}
        if self.rope_type == "yarn":
            rope |= {"rope_type": "yarn", "factor": self.rotary_scaling_factor, **_YARN}
            rope |= {"mscale": self.mscale, "mscale_all_dim": self.mscale_all_dim}
        return {theirs: getattr(self, ours) for ours, theirs in _THEIRS.items()} | {
            "rope_parameters": rope,
            "n_group": self.moe_router_num_groups or 1,
            "topk_group": self.moe_router_group_topk or 1,
            "n_shared_experts": shared_experts,
            "hmoe_shared_expert_width": self.moe_shared_expert_intermediate_size,
            "num_nextn_predict_layers": self.mtp_num_layers,
        }


def from_config(config: Mapping, rope: Mapping) -> DeepSeek:
    """rope: rope_parameters, or rope_scaling of older files. Raises ValueError for a YaRN that Megatron can't have,
    KeyError or TypeError for what is missing."""
    is_yarn = rope.get("rope_type", rope.get("type")) == "yarn"
    wrong = [f"{name} {rope.get(name)!r:.40}" for name, value in _YARN.items() if rope.get(name, value) != value]
    if rope.get("attention_factor") is not None or rope.get("truncate", True) is not True:
        wrong.append("attention_factor or truncate")
    if is_yarn and wrong:
        raise ValueError(f"config.json: YaRN with {', '.join(wrong)}: a model with it can't be trained here")
    shared = config["n_shared_experts"] * config["moe_intermediate_size"]
    return DeepSeek.of(
        {ours: config[theirs] for ours, theirs in _THEIRS.items()}
        | {
            "rope_type": "yarn" if is_yarn else "rope",
            "rotary_scaling_factor": rope["factor"] if is_yarn else 1.0,
            "mscale": rope.get("mscale", 1.0) if is_yarn else 1.0,
            "mscale_all_dim": rope.get("mscale_all_dim", 0.0) if is_yarn else 0.0,
            "moe_router_num_groups": config["n_group"],
            "moe_router_group_topk": config["topk_group"],
            "moe_shared_expert_intermediate_size": config.get("hmoe_shared_expert_width", shared),
            # The second is transformers' own name of it.
            "mtp_num_layers": config.get("num_nextn_predict_layers", config.get("num_mtp_layers", 0)),
        }
    )
