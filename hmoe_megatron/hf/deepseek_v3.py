"""transformers' DeepSeek-V3, padded."""

import re
from collections.abc import Collection, Mapping
from dataclasses import replace

from hmoe_megatron.hf import deepseek_settings
from hmoe_megatron.hf.architectures import Padded, stock_settings
from hmoe_megatron.hf.deepseek_settings import NORM_EPS
from hmoe_megatron.hf.model_settings import ModelSettings

_SHARED = re.compile(r"model\.layers\.\d+\.mlp\.shared_experts\.(gate|up|down)_proj\.weight")


class DeepSeekV3(Padded):
    """Its shared expert has a whole number of experts' widths, so it is padded too. Layers that predict a token are
    after the others, as in the official directory; transformers leaves them alone."""

    model_type = "deepseek_v3"
    stock_name = "DeepseekV3"
    exported = Padded.exported | deepseek_settings.EXPORTED

    @staticmethod
    def problems(model: ModelSettings) -> dict[str, bool]:
        is_dense = [not widths_E for widths_E in model.widths]
        shared = model.deepseek.moe_shared_expert_intermediate_size
        found = {
            "--moe-router-topk-scaling-factor": False,  # it has
            "latent vectors without --qk-layernorm": not model.qk_norm,
            "--group-query-attention": model.groups != model.heads,
            f"--norm-epsilon other than {NORM_EPS:g} for latent vectors": model.norm_eps != NORM_EPS,
            "dense layers after one with experts (--moe-layer-freq)": is_dense != sorted(is_dense, reverse=True),
            "no other layers than dense ones": not any(model.widths[: model.layers]),
            "layers without --moe-shared-expert-intermediate-size": not shared,
        }
        return found | model.deepseek.problems(model.experts, model.experts_per_token)

    def refusal(self, found: list[str]) -> str:
        what = ", ".join(found)
        return f"{self.model_type}: transformers and Megatron compute other things with {what}: it can't be converted"

    @property
    def shared_experts(self) -> int:
        """How many widths of an expert the shared one takes."""
        return -(-self.model.deepseek.moe_shared_expert_intermediate_size // self.width)

    def config(self, dtype: str, token_ids: Mapping) -> dict:
        model = self.model
        own = {
            "intermediate_size": model.dense_width or self.width,
            "moe_intermediate_size": self.width,
            "n_routed_experts": model.experts,
            "first_k_dense_replace": sum(not widths_E for widths_E in model.widths),
            "routed_scaling_factor": model.scaling_factor or 1.0,
            "norm_topk_prob": model.experts_per_token > 1,  # as Megatron has it
            "scoring_func": "sigmoid",
            "topk_method": "noaux_tc",
            "moe_layer_freq": 1,
            "attention_bias": False,
            "rope_interleave": True,
        }
        return super().config(dtype, token_ids) | own | model.deepseek.config(model.rope_theta, self.shared_experts)

    @staticmethod
    def settings(config: Mapping) -> ModelSettings:
        rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
        deepseek = deepseek_settings.from_config(config, rope)
        chosen, dense = config["num_experts_per_tok"], config["first_k_dense_replace"]
        rows = config["num_hidden_layers"] + deepseek.mtp_num_layers
        experts = [config["moe_intermediate_size"]] * config["n_routed_experts"]
        allowed = {
            "rope_type": (rope.get("rope_type", rope.get("type")), (None, "default", "yarn")),
            "rms_norm_eps": (config["rms_norm_eps"], (NORM_EPS,)),
            "num_key_value_heads": (config.get("num_key_value_heads"), (None, config["num_attention_heads"])),
            "attention_bias": (config.get("attention_bias"), (None, False)),
            "rope_interleave": (config.get("rope_interleave"), (None, True)),
            "norm_topk_prob": (config.get("norm_topk_prob", True), (chosen > 1,)),
            "scoring_func": (config.get("scoring_func"), (None, "sigmoid")),
            "topk_method": (config.get("topk_method"), (None, "noaux_tc")),
            "moe_layer_freq": (config.get("moe_layer_freq"), (None, 1)),
        }
        widths = config.get("hmoe_expert_widths") or [[] if layer < dense else experts for layer in range(rows)]
        factor = config["routed_scaling_factor"]
        return replace(
            stock_settings(config, widths, pre_softmax=False, qk_norm=True, allowed=allowed),
            head_dim=deepseek.qk_pos_emb_head_dim,
            scaling_factor=None if factor == 1 else factor,
            router_fp32=bool(config.get("hmoe_router_fp32", True)),  # as it computes
            deepseek=deepseek,
        )

    def as_stored(self, names: Collection[str]) -> "DeepSeekV3":
        """transformers saves none of the layers that predict a token, and their number."""
        model = self.model
        if any(name.startswith(f"model.layers.{model.layers}.") for name in names) or not model.deepseek.mtp_num_layers:
            return self
        less = replace(model, widths=model.widths[: model.layers], deepseek=replace(model.deepseek, mtp_num_layers=0))
        return DeepSeekV3(less, self.width)

    def padding(self, name: str) -> tuple[int, int, int] | None:
        found = _SHARED.fullmatch(name)
        if found is None:
            return super().padding(name)
        own = self.model.deepseek.moe_shared_expert_intermediate_size
        return int(found[1] == "down"), own, self.shared_experts * self.width
