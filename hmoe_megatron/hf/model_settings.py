"""What a converted model is: the same settings as a checkpoint's manifest, a config.json and flags tell them."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

from hmoe_megatron.flag_files import flag_named, last_value
from hmoe_megatron.hf.deepseek_settings import DeepSeek

MODEL_TYPE = "hmoe"
AUTO_MAP = {
    "AutoConfig": "configuration_hmoe.HMoEConfig",
    "AutoModel": "modeling_hmoe.HMoEModel",
    "AutoModelForCausalLM": "modeling_hmoe.HMoEForCausalLM",
}

# Settings of a checkpoint that modeling_hmoe.py computes as Megatron does: name -> what is allowed.
EXPORTED = {
    "normalization": ("RMSNorm",),
    "swiglu": (True,),
    "add_bias_linear": (False,),
    "qk_l2_norm": (False,),
    "layernorm_zero_centered_gamma": (False,),
    "apply_residual_connection_post_layernorm": (False,),
    "position_embedding_type": ("rope",),
    "rotary_interleaved": (False,),
    "rotary_percent": (1.0,),
    "use_rope_scaling": (False,),
    "rotary_seq_len_interpolation_factor": (None,),
    "no_rope_freq": (None,),
    "window_size": (None,),
    "multi_latent_attention": (False,),
    "attention_output_gate": (False,),
    "mtp_num_layers": (None, 0),
    "mtp_use_repeated_layer": (False,),
    "softmax_type": ("vanilla",),
    "activation_func_clamp_value": (None,),
    "glu_linear_offset": (0.0,),
    "moe_router_score_function": ("softmax",),
    "moe_router_enable_expert_bias": (False,),
    "moe_router_num_groups": (None,),
    "moe_router_group_topk": (None,),
    "moe_expert_capacity_factor": (None,),
    "moe_apply_probs_on_input": (False,),
    "moe_latent_size": (None,),
    "moe_shared_expert_intermediate_size": (None,),
    "moe_shared_expert_gate": (False,),
    "moe_router_dtype": (None, "fp32"),
}


@dataclass(frozen=True)
class ModelSettings:
    """vocabulary_rows: of the embedding, those that only pad it too, so that logits stay the same. widths: of the
    experts of each layer, those that predict one more token last; () for a dense layer, which then has dense_width.
    scaling_factor: of Top-K's weights. deepseek: its parts; head_dim is then of the positions alone."""

    layers: int
    hidden: int
    heads: int
    groups: int
    head_dim: int
    vocabulary_rows: int
    max_positions: int
    norm_eps: float
    rope_theta: float
    qkv_bias: bool
    qk_norm: bool
    tied: bool
    widths: tuple[tuple[int, ...], ...]
    dense_width: int | None
    router: str
    experts_per_token: int | None
    top_p: float | None
    max_experts_per_token: int | None
    pre_softmax: bool
    scaling_factor: float | None
    router_fp32: bool
    p_penalty_coeff: float
    load_balance_coeff: float
    router_entropy_coeff: float
    init_std: float
    deepseek: DeepSeek | None = None

    @property
    def experts(self) -> int:
        return max(map(len, self.widths))

    def check(self) -> None:
        """Raises ValueError that names a size that is none; of a config.json, which is untrusted."""
        sizes = {
            name: getattr(self, name)
            for name in ("layers", "hidden", "heads", "groups", "head_dim", "vocabulary_rows", "max_positions")
        }
        sizes |= {
            name: getattr(self, name)
            for name in ("dense_width", "experts_per_token", "max_experts_per_token")
            if getattr(self, name) is not None
        }
        sizes |= {f"width of layer {layer}": width for layer, widths_E in enumerate(self.widths) for width in widths_E}
        numbers = {
            name: getattr(self, name)
            for name in (
                "norm_eps",
                "rope_theta",
                "top_p",
                "scaling_factor",
                "p_penalty_coeff",
                "load_balance_coeff",
                "init_std",
                "router_entropy_coeff",
            )
        }
        if self.deepseek:
            sizes, numbers = sizes | self.deepseek.sizes(), numbers | self.deepseek.numbers()
        wrong = [
            f"{name} {value!r:.40}"
            for name, value in sizes.items()
            if type(value) is not int or not 0 < value < 1 << 24
        ]
        wrong += [
            f"{name} {value!r:.40}"
            for name, value in numbers.items()
            if value is not None and (type(value) not in (int, float) or not math.isfinite(value))
        ]
        if not wrong and self.heads % self.groups:
            wrong = [f"{self.heads} heads in {self.groups} groups"]
        rows = self.layers + (self.deepseek.mtp_num_layers if self.deepseek else 0)
        if not wrong and (len(self.widths) != rows or {0, self.experts} < {0, *map(len, self.widths)}):
            wrong = [f"experts of {len(self.widths)} layers, {sorted({*map(len, self.widths)})[:9]} each"]
        if not wrong and not all(self.widths) and self.dense_width is None:
            wrong = ["no width of the dense layers"]
        positive = ("norm_eps", "rope_theta", "init_std") + (("top_p",) if self.router == "topp" else ())
        positive += () if self.scaling_factor is None else ("scaling_factor",)  # Megatron takes 0 for none
        if not wrong:
            wrong += [f"{name} {getattr(self, name)!r}" for name in positive if not (getattr(self, name) or 0) > 0]
        if not wrong and int(self.rope_theta) != self.rope_theta:
            wrong = [f"rope_theta {self.rope_theta}: Megatron takes whole numbers only"]
        if self.router not in ("topk", "topp"):
            wrong.append(f"router {self.router!r:.40}")
        if wrong:
            raise ValueError(f"config.json: not the sizes of a model: {'; '.join(wrong[:9])}")


def from_checkpoint(
    settings: Mapping, shapes: Mapping[str, Sequence[int]], flags: Sequence[str], exported: Mapping[str, tuple]
) -> ModelSettings:
    """settings: of the checkpoint's manifest; shapes: of its tensors by key; flags: of the run. exported: what settings
    the exported model may have, () for any.

    Raises ValueError that lists everything the exported model could not compute.
    """
    problems = [
        f"{flag_named(name)} {settings[name]}"
        for name, allowed in exported.items()
        if allowed and name in settings and settings[name] not in allowed
    ]
    if problems:
        raise ValueError(f"the exported model has no {', no '.join(problems)}: it can't be exported")
    deepseek = DeepSeek.of(settings) if settings.get("multi_latent_attention") else None
    layers = settings["num_layers"]
    rows = layers + (deepseek.mtp_num_layers if deepseek else 0)
    widths = tuple(tuple(settings["expert_widths"].get(str(layer), ())) for layer in range(rows))
    dense = [layer for layer in range(layers) if not widths[layer]]
    dense_width = shapes[f"decoder.layers.{dense[0]}.mlp.linear_fc2.weight"][1] if dense else None
    top_p = settings["hmoe_router"] == "topp"
    entropy = settings["hmoe_router_entropy_coeff"]
    if entropy is None:
        from hmoe_megatron.config import PAPER_ROUTER_ENTROPY_COEFF

        entropy = PAPER_ROUTER_ENTROPY_COEFF if top_p else 0.0
    context = [last_value(flags, name) for name in ("--max-position-embeddings", "--seq-length")]
    if not any(context):
        raise ValueError(
            "the run's flags have no --max-position-embeddings and no --seq-length: its run_arguments.json is not whole"
        )
    return ModelSettings(
        layers=layers,
        hidden=settings["hidden_size"],
        heads=settings["num_attention_heads"],
        groups=settings["num_query_groups"] if settings["group_query_attention"] else settings["num_attention_heads"],
        head_dim=deepseek.qk_pos_emb_head_dim if deepseek else settings["kv_channels"],
        vocabulary_rows=shapes["embedding.word_embeddings.weight"][0],
        max_positions=min(int(length) for length in context if length),
        norm_eps=settings["layernorm_epsilon"],
        rope_theta=float(settings["rotary_base"]),
        qkv_bias=settings["add_qkv_bias"],
        qk_norm=settings["qk_layernorm"],
        tied=not settings["untie_embeddings_and_output_weights"],
        widths=widths,
        dense_width=dense_width,
        router=settings["hmoe_router"],
        experts_per_token=None if top_p else settings["moe_router_topk"],
        top_p=settings["hmoe_top_p"],
        max_experts_per_token=settings["hmoe_max_experts_per_token"],
        pre_softmax=False if top_p else settings["moe_router_pre_softmax"],
        scaling_factor=settings["moe_router_topk_scaling_factor"],
        router_fp32=settings["moe_router_dtype"] == "fp32",
        p_penalty_coeff=settings["hmoe_p_penalty_coeff"],
        load_balance_coeff=settings["hmoe_load_balance_coeff"],
        router_entropy_coeff=entropy,
        init_std=float(last_value(flags, "--init-method-std", 0.02)),
        deepseek=deepseek,
    )


# Ours -> config.json's, where the value is the same.
_CONFIG = {
    "layers": "num_hidden_layers",
    "hidden": "hidden_size",
    "heads": "num_attention_heads",
    "groups": "num_key_value_heads",
    "head_dim": "head_dim",
    "vocabulary_rows": "vocab_size",
    "max_positions": "max_position_embeddings",
    "norm_eps": "rms_norm_eps",
    "qkv_bias": "attention_bias",
    "qk_norm": "use_qk_norm",
    "tied": "tie_word_embeddings",
    "dense_width": "intermediate_size",
    "router": "router",
    "experts_per_token": "num_experts_per_tok",
    "max_experts_per_token": "max_experts_per_token",
    "top_p": "router_top_p",  # not top_p: transformers would take that one for sampling
    "pre_softmax": "router_pre_softmax",
    "scaling_factor": "router_scaling_factor",
    "p_penalty_coeff": "p_penalty_coeff",
    "load_balance_coeff": "load_balance_coeff",
    "router_entropy_coeff": "router_entropy_coeff",
    "init_std": "initializer_range",
}


def to_config(model: ModelSettings, dtype: str, token_ids: Mapping[str, int | None]) -> dict:
    """config.json of the exported model. dtype: "float32" or "bfloat16"; token_ids: bos_token_id and so on."""
    config = {"architectures": ["HMoEForCausalLM"], "model_type": MODEL_TYPE, "auto_map": AUTO_MAP, "dtype": dtype}
    config |= {theirs: getattr(model, ours) for ours, theirs in _CONFIG.items()}
    config |= {
        "rope_parameters": {"rope_type": "default", "rope_theta": model.rope_theta},
        "hidden_act": "silu",
        "attention_dropout": 0.0,
        "use_cache": True,
        "expert_widths": [list(widths_E) for widths_E in model.widths],
        "router_dtype": "float32" if model.router_fp32 else None,
        "output_router_logits": False,
    }
    return config | dict(token_ids)


def from_config(config: Mapping) -> ModelSettings:
    """Of an exported directory's config.json. Raises ValueError that names what is missing."""
    missing = [name for name in (*_CONFIG.values(), "expert_widths", "rope_parameters") if name not in config]
    if missing:
        raise ValueError(f"config.json lacks {', '.join(missing)}: give a directory that to-hf wrote")
    values = {ours: config[theirs] for ours, theirs in _CONFIG.items()}
    values |= {
        "rope_theta": float(config["rope_parameters"]["rope_theta"]),
        "widths": tuple(map(tuple, config["expert_widths"])),
        "router_fp32": config.get("router_dtype") == "float32",
    }
    assert values.keys() == {field.name for field in fields(ModelSettings)} - {"deepseek"}
    return ModelSettings(**values)


def megatron_flags(model: ModelSettings) -> list[str]:
    """Flags of pretrain_hmoe.py that describe this model; none of training, data, tokenizer or layout."""
    flags = {
        "num-layers": model.layers,
        "hidden-size": model.hidden,
        "num-attention-heads": model.heads,
        "kv-channels": model.head_dim,
        "seq-length": model.max_positions,
        "max-position-embeddings": model.max_positions,
        "norm-epsilon": model.norm_eps,
        "rotary-base": int(model.rope_theta),
        "init-method-std": model.init_std,
        "normalization": "RMSNorm",
        "position-embedding-type": "rope",
        "num-experts": model.experts,
        "hmoe-router": model.router,
        "hmoe-p-penalty-coeff": model.p_penalty_coeff,
        "hmoe-load-balance-coeff": model.load_balance_coeff,
        "hmoe-widths": _widths_flag(model.widths),
        "attention-dropout": 0,
        "hidden-dropout": 0,
        "moe-router-load-balancing-type": "none",
    }
    if model.groups != model.heads:
        flags["num-query-groups"] = model.groups
    if model.dense_width is not None:
        is_moe = ",".join(str(int(bool(widths_E))) for widths_E in model.widths[: model.layers])
        flags |= {"ffn-hidden-size": model.dense_width, "moe-layer-freq": f"[{is_moe}]"}
    optional = {
        "moe-router-topk": model.experts_per_token,
        "moe-router-topk-scaling-factor": model.scaling_factor,
        "hmoe-top-p": model.top_p,
        "hmoe-max-experts-per-token": model.max_experts_per_token,
        "hmoe-router-entropy-coeff": model.router_entropy_coeff if model.router == "topp" else None,
        "moe-router-dtype": "fp32" if model.router_fp32 else None,
    }
    flags |= {name: value for name, value in optional.items() if value is not None}
    if model.deepseek:
        flags |= model.deepseek.flags()
    switches = {
        "swiglu": True,
        "disable-bias-linear": True,
        "group-query-attention": model.groups != model.heads,
        "add-qkv-bias": model.qkv_bias,
        "qk-layernorm": model.qk_norm,
        "moe-router-pre-softmax": model.pre_softmax,
        "untie-embeddings-and-output-weights": not model.tied,
        "multi-latent-attention": model.deepseek is not None,
        "no-rope-fusion": model.deepseek is not None,  # Megatron's is for yarn, and needs a GPU
        "moe-router-enable-expert-bias": model.deepseek is not None,
    }
    words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    return words + [f"--{name}" for name, is_on in switches.items() if is_on]


def _widths_flag(widths) -> str:
    """--hmoe-widths: one layer's for all, or layer by layer."""
    held = {layer: ",".join(map(str, widths_E)) for layer, widths_E in enumerate(widths) if widths_E}
    if len(set(held.values())) == 1:
        return next(iter(held.values()))
    return ";".join(f"{layer}={text}" for layer, text in held.items())
