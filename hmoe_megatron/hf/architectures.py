"""The forms of a Hugging Face directory: how each names and shapes its tensors, and its config.json, both ways."""

import re
from collections.abc import Collection, Mapping

import torch

from hmoe_megatron.hf.model_settings import EXPORTED, MODEL_TYPE, ModelSettings, from_config, to_config

EXPERT = re.compile(r"model\.layers\.(\d+)\.mlp\.experts\.(\d+)\.(gate|up|down)_proj\.weight")
_WIDTH_MULTIPLE = 8


class Native:
    """Our own, with the model's code beside the weights."""

    model_type = MODEL_TYPE
    code = ("configuration_hmoe.py", "hmoe_layer.py", "modeling_hmoe.py")
    cost = 1.0  # parameters of the experts as they are stored, over their own
    exported = EXPORTED  # settings of a checkpoint that it computes

    def __init__(self, model: ModelSettings):
        self.model = model

    def config(self, dtype: str, token_ids: Mapping) -> dict:
        return to_config(self.model, dtype, token_ids)

    @staticmethod
    def settings(config: Mapping) -> ModelSettings:
        return from_config(config)

    @classmethod
    def stored(cls, model: ModelSettings, config: Mapping) -> "Native":
        """That of a directory with this config.json. Raises ValueError."""
        return cls(model)

    def as_stored(self, names: Collection[str]) -> "Native":
        """Less what a directory with these tensors may leave out."""
        return self

    def name(self, name: str) -> str:
        """Its name of the tensor that we call so."""
        return name

    def pack(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor as it is stored."""
        return tensor

    def unpack(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """The inverse of `pack`. Raises ValueError if something would be lost."""
        return tensor


class Padded(Native):
    """A stock model of transformers, with no code of ours: every expert padded with zeros to one width, which adds
    zeros to its output. Top-K only. ``hmoe_expert_widths`` in the config tells the way back."""

    code = ()
    stock_name = ""  # of transformers' classes
    width_field = "moe_intermediate_size"

    def __init__(self, model: ModelSettings, width: int | None = None):
        """width: of every expert as it is stored; None is of the widest, with rows of whole 16 bytes in bf16, without
        which torch's grouped matrix product fails in transformers."""
        problems = {
            "--hmoe-router topp": model.router != "topk",
            "--moe-router-topk-scaling-factor": model.scaling_factor is not None,
            "--add-qkv-bias": model.qkv_bias,
        } | self.problems(model)
        found = [what for what, is_there in problems.items() if is_there]
        if found:
            raise ValueError(self.refusal(found))
        if not any(model.widths):
            raise ValueError(f"config.json of a {self.model_type}: no layer has experts")
        super().__init__(model)
        widest = max(max(widths_E, default=0) for widths_E in model.widths)
        self.width = width or -(-widest // _WIDTH_MULTIPLE) * _WIDTH_MULTIPLE
        if self.width < widest:
            raise ValueError(f"config.json: {self.width_field} {width}, and an expert of width {widest}")
        layers = sum(map(bool, model.widths))
        self.cost = self.width * model.experts * layers / sum(map(sum, model.widths))

    @classmethod
    def stored(cls, model: ModelSettings, config: Mapping) -> "Padded":
        width = config[cls.width_field]
        if type(width) is not int or width < 1:
            raise ValueError(f"config.json: {cls.width_field} {width!r:.40}")
        return cls(model, width)

    @staticmethod
    def problems(model: ModelSettings) -> dict[str, bool]:
        """What the stock model lacks: flag -> whether this model has it."""
        raise NotImplementedError

    def refusal(self, found: list[str]) -> str:
        return f"--padded {self.model_type}: {self.stock_name} has no {', no '.join(found)}; leave --padded out"

    def config(self, dtype: str, token_ids: Mapping) -> dict:
        model = self.model
        return {
            "architectures": [f"{self.stock_name}ForCausalLM"],
            "model_type": self.model_type,
            "dtype": dtype,
            "hidden_act": "silu",
            "num_hidden_layers": model.layers,
            "hidden_size": model.hidden,
            "num_attention_heads": model.heads,
            "num_key_value_heads": model.groups,
            "head_dim": model.head_dim,
            "vocab_size": model.vocabulary_rows,
            "max_position_embeddings": model.max_positions,
            "rms_norm_eps": model.norm_eps,
            "sliding_window": None,
            "rope_parameters": {"rope_type": "default", "rope_theta": model.rope_theta},
            "attention_dropout": 0.0,
            "tie_word_embeddings": model.tied,
            "num_experts_per_tok": model.experts_per_token,
            "router_aux_loss_coef": model.load_balance_coeff,
            "initializer_range": model.init_std,
            "use_cache": True,
            "output_router_logits": False,
            "hmoe_expert_widths": [list(widths_E) for widths_E in model.widths],
            "hmoe_p_penalty_coeff": model.p_penalty_coeff,
            "hmoe_router_fp32": model.router_fp32,
        } | dict(token_ids)

    def padding(self, name: str) -> tuple[int, int, int] | None:
        """(dimension, own width, stored width) of a matrix that is padded; None of any other tensor."""
        found = EXPERT.fullmatch(name)
        if found is None:
            return None
        return int(found[3] == "down"), self.model.widths[int(found[1])][int(found[2])], self.width

    def pack(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        padding = self.padding(name)
        if padding is None:
            return tensor
        dim, _, stored = padding
        missing = stored - tensor.shape[dim]
        return torch.nn.functional.pad(tensor, (0, missing) if dim else (0, 0, 0, missing))

    def unpack(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        padding = self.padding(name)
        if padding is None:
            return tensor
        dim, width, _ = padding
        if tensor.shape[dim] < width:
            raise ValueError(f"{self.name(name)}: {tensor.shape[dim]} wide, config.json says {width}")
        if tensor.narrow(dim, width, tensor.shape[dim] - width).count_nonzero():
            raise ValueError(
                f"{self.name(name)}: not zero beyond the width {width} of config.json: it was trained since; take its "
                "hmoe_expert_widths and hmoe_shared_expert_width out to keep what was learnt"
            )
        return tensor.narrow(dim, 0, width)


class Mixtral(Padded):
    """transformers' Mixtral: weights are renormalised, every layer has experts, queries and keys have no norm."""

    model_type = "mixtral"
    stock_name = "Mixtral"
    width_field = "intermediate_size"

    @staticmethod
    def problems(model: ModelSettings) -> dict[str, bool]:
        return {
            "--moe-router-pre-softmax": model.pre_softmax,
            "--qk-layernorm": model.qk_norm,
            "dense layers (--moe-layer-freq)": not all(model.widths),
        }

    def config(self, dtype: str, token_ids: Mapping) -> dict:
        own = {"intermediate_size": self.width, "num_local_experts": self.model.experts}
        return super().config(dtype, token_ids) | own

    @staticmethod
    def settings(config: Mapping) -> ModelSettings:
        experts, layers = config["num_local_experts"], config["num_hidden_layers"]
        widths = config.get("hmoe_expert_widths") or [[config["intermediate_size"]] * experts] * layers
        return stock_settings(config, widths, pre_softmax=False, theta=1e6)  # what transformers has without one

    def name(self, name: str) -> str:
        name = name.replace(".mlp.", ".block_sparse_moe.")
        for ours, theirs in (("gate_proj", "w1"), ("down_proj", "w2"), ("up_proj", "w3")):
            name = name.replace(f".{ours}.", f".{theirs}.")
        return name


class Qwen3Moe(Padded):
    """transformers' Qwen3-MoE: queries and keys have a norm; layers may be dense, weights of the whole softmax."""

    model_type = "qwen3_moe"
    stock_name = "Qwen3Moe"

    @staticmethod
    def problems(model: ModelSettings) -> dict[str, bool]:
        return {"queries and keys without --qk-layernorm": not model.qk_norm}

    def config(self, dtype: str, token_ids: Mapping) -> dict:
        model = self.model
        own = {
            "use_sliding_window": False,
            "attention_bias": False,
            "intermediate_size": model.dense_width or self.width,
            "moe_intermediate_size": self.width,
            "num_experts": model.experts,
            "norm_topk_prob": not model.pre_softmax,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [layer for layer, widths_E in enumerate(model.widths) if not widths_E],
        }
        return super().config(dtype, token_ids) | own

    @staticmethod
    def settings(config: Mapping) -> ModelSettings:
        if config.get("attention_bias"):  # Qwen3-MoE's is in the output product too
            raise ValueError("config.json: attention_bias true: a model with it can't be trained here")
        step, dense = config.get("decoder_sparse_step", 1), set(config.get("mlp_only_layers") or ())
        count = config["num_experts"] if "num_experts" in config else config["num_local_experts"]  # transformers 5.5
        experts = [config["moe_intermediate_size"]] * count
        widths = config.get("hmoe_expert_widths") or [
            experts if layer not in dense and (layer + 1) % step == 0 else []
            for layer in range(config["num_hidden_layers"])
        ]
        return stock_settings(config, widths, pre_softmax=not config.get("norm_topk_prob", False), qk_norm=True)


class Llama(Native):
    """transformers' LLaMA, dense, to read only."""

    model_type = "llama"

    @staticmethod
    def settings(config: Mapping) -> ModelSettings:
        return stock_settings(config, [()] * config["num_hidden_layers"], pre_softmax=False)


class Qwen3(Native):
    """transformers' Qwen3, dense, to read only."""

    model_type = "qwen3"

    @staticmethod
    def settings(config: Mapping) -> ModelSettings:
        return stock_settings(
            config,
            [()] * config["num_hidden_layers"],
            pre_softmax=False,
            qk_norm=True,
            qkv_bias=bool(config.get("attention_bias")),
        )


def stock_settings(
    config: Mapping, widths, pre_softmax: bool, qk_norm=False, qkv_bias=False, theta: float = 10000.0, allowed=()
) -> ModelSettings:
    """Of a config.json as transformers has it. allowed: field -> (its value, those that can be trained here), over the
    usual ones. Raises ValueError that lists fields that can't, KeyError or TypeError for what is missing."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    partial = rope.get("partial_rotary_factor", config.get("partial_rotary_factor"))
    # Qwen's has a size whether it is used or not.
    window = config.get("sliding_window") if config.get("use_sliding_window", True) else None
    given = {
        "rope_type": (rope.get("rope_type", rope.get("type")), (None, "default")),  # `type` in older files
        "sliding_window": (window, (None,)),
        "partial_rotary_factor": (partial, (None, 1.0)),
        "hidden_act": (config.get("hidden_act"), (None, "silu")),
        "quantization_config": (config.get("quantization_config"), (None,)),
    } | dict(allowed)
    wrong = [f"{name} {value!r:.40}" for name, (value, allowed) in given.items() if value not in allowed]
    if wrong:
        raise ValueError(f"config.json: {', '.join(wrong)}: a model with it can't be trained here")
    heads = config["num_attention_heads"]
    return ModelSettings(
        layers=config["num_hidden_layers"],
        hidden=config["hidden_size"],
        heads=heads,
        groups=config.get("num_key_value_heads") or heads,
        head_dim=config.get("head_dim") or config["hidden_size"] // heads,
        vocabulary_rows=config["vocab_size"],
        max_positions=config["max_position_embeddings"],
        norm_eps=config["rms_norm_eps"],
        rope_theta=float(rope.get("rope_theta") or config.get("rope_theta") or theta),
        qkv_bias=qkv_bias,
        qk_norm=qk_norm,
        tied=bool(config.get("tie_word_embeddings")),
        widths=tuple(map(tuple, widths)),
        dense_width=config["intermediate_size"] if not all(widths) else None,
        router="topk",
        experts_per_token=config["num_experts_per_tok"] if any(widths) else None,
        top_p=None,
        max_experts_per_token=None,
        pre_softmax=pre_softmax,
        scaling_factor=None,
        router_fp32=bool(config.get("hmoe_router_fp32")),
        p_penalty_coeff=float(config.get("hmoe_p_penalty_coeff", 0.0)),
        load_balance_coeff=float(config.get("router_aux_loss_coef", 0.0)),
        router_entropy_coeff=0.0,
        init_std=float(config.get("initializer_range", 0.02)),
    )
