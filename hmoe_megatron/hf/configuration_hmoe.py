"""Configuration of an HMoE language model: a LLaMA-like decoder whose experts differ in width (arXiv 2408.10681)."""

import math

from transformers import PreTrainedConfig

ROUTERS = ("topk", "topp")
EXPERT_PATHS = ("sorted", "loop")


class HMoEConfig(PreTrainedConfig):
    """Settings of HMoEForCausalLM, checked when made: ValueError names the field, its value and the remedy.

    expert_widths: for each layer the width of each of its experts; [] for a dense layer of width ``intermediate_size``.
    router: "topk" (``num_experts_per_tok`` experts a token) or "topp" (the fewest whose probabilities reach
    ``router_top_p``, at most ``max_experts_per_token``). A field named top_p would set generate()'s nucleus sampling.
    router_pre_softmax: softmax over all experts before Top-K, not renormalised after it. router_scaling_factor:
    multiplies the weights of Top-K. router_dtype: "float32" computes the router's logits in float32, None in the
    model's dtype. expert_path: "sorted" or the slower reference "loop", see modeling_hmoe.py.
    output_router_logits: return the router's logits and add its losses, by the three coefficients, to the loss.
    attention_bias: on the query, key and value projections. use_qk_norm: RMSNorm of each head before RoPE.
    """

    model_type = "hmoe"
    keys_to_ignore_at_inference = ["past_key_values"]
    has_no_defaults_at_init = True  # transformers 5.4 to 5.12 ask: expert_widths must be given

    vocab_size: int = 32000
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    intermediate_size: int | None = None
    hidden_act: str = "silu"
    max_position_embeddings: int = 4096
    rms_norm_eps: float = 1e-5
    rope_parameters: dict | None = None
    attention_bias: bool = False
    attention_dropout: float = 0.0
    use_qk_norm: bool = False
    tie_word_embeddings: bool = False
    initializer_range: float = 0.02
    use_cache: bool = True
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None
    expert_widths: list[list[int]] | None = None
    router: str = "topk"
    num_experts_per_tok: int | None = None
    router_top_p: float | None = None
    max_experts_per_token: int | None = None
    router_pre_softmax: bool = False
    router_scaling_factor: float | None = None
    router_dtype: str | None = None
    expert_path: str = "sorted"
    output_router_logits: bool = False
    p_penalty_coeff: float = 0.0
    load_balance_coeff: float = 0.0
    router_entropy_coeff: float = 0.0

    def __post_init__(self, **kwargs):
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.head_dim is None and _is_count(self.hidden_size) and _is_count(self.num_attention_heads):
            self.head_dim = self.hidden_size // self.num_attention_heads
        super().__post_init__(**kwargs)
        self.check()

    def check(self):
        """Raises ValueError with every problem. The model calls it too: from_pretrained sets fields after __init__."""
        problems = [*self._shape_problems(), *self._number_problems()]
        if not problems:
            problems = [*self._width_problems(), *self._router_problems()]
        if problems:
            raise ValueError("HMoEConfig: " + "\n".join(problems))

    def _shape_problems(self):
        counts = (
            "vocab_size hidden_size num_hidden_layers num_attention_heads num_key_value_heads head_dim "
            "max_position_embeddings"
        )
        optional = "intermediate_size num_experts_per_tok max_experts_per_token"
        for name in (*counts.split(), *optional.split()):
            value = getattr(self, name)
            if not _is_count(value) and not (value is None and name in optional.split()):
                yield f"{name} {value!r}: give a whole number of at least 1"
        heads, groups = self.num_attention_heads, self.num_key_value_heads
        if _is_count(heads) and _is_count(groups) and heads % groups:
            yield f"num_attention_heads {heads} is no multiple of num_key_value_heads {groups}: give a divisor"
        if _is_count(self.head_dim) and self.head_dim % 2:
            yield f"head_dim {self.head_dim} is odd: RoPE turns pairs, give an even number"

    def _number_problems(self):
        choices = {
            "hidden_act": ("silu",),
            "router": ROUTERS,
            "router_dtype": (None, "float32"),
            "expert_path": EXPERT_PATHS,
        }
        for name, known in choices.items():
            if getattr(self, name) not in known:
                yield f"{name} {getattr(self, name)!r} is not known: give one of {', '.join(map(repr, known))}"
        for name in ("initializer_range", "p_penalty_coeff", "load_balance_coeff", "router_entropy_coeff"):
            if not _is_number(getattr(self, name), low=0):
                yield f"{name} {getattr(self, name)!r}: give a finite number, 0 or more"
        if not (_is_number(self.attention_dropout, low=0) and self.attention_dropout < 1):
            yield f"attention_dropout {self.attention_dropout!r}: give a probability below 1"
        if not (_is_number(self.rms_norm_eps, low=0) and self.rms_norm_eps > 0):
            yield f"rms_norm_eps {self.rms_norm_eps!r}: give a number above 0"
        theta = (self.rope_parameters or {}).get("rope_theta")
        if not (_is_number(theta, low=0) and theta > 0):
            yield f"rope_parameters {self.rope_parameters!r}: give rope_theta, a number above 0"

    def _width_problems(self):
        layers = self.expert_widths
        if not isinstance(layers, list | tuple) or len(layers) != self.num_hidden_layers:
            given = f"of {len(layers)} layers" if isinstance(layers, list | tuple) else repr(layers)
            yield f"expert_widths {given}, num_hidden_layers is {self.num_hidden_layers}: give a list of widths a layer"
            return
        for layer, widths in enumerate(layers):
            if not isinstance(widths, list | tuple) or not all(map(_is_count, widths)):
                yield f"expert_widths[{layer}] {widths!r}: give whole numbers of at least 1, [] if it is dense"
            elif not widths and self.intermediate_size is None:
                yield f"expert_widths[{layer}] is [], a dense layer, and intermediate_size is None: give its width"
            elif widths and self.router == "topk" and len(widths) < (self.num_experts_per_tok or 0):
                yield (
                    f"num_experts_per_tok {self.num_experts_per_tok} is more than the {len(widths)} experts of "
                    f"expert_widths[{layer}]: give at most {len(widths)}"
                )

    def _router_problems(self):
        if self.router == "topk":
            if self.num_experts_per_tok is None and any(self.expert_widths or []):
                yield "num_experts_per_tok None: router 'topk' needs a whole number of at least 1"
            others = {"router_top_p": None, "max_experts_per_token": None}
        else:
            if not (_is_number(self.router_top_p, low=0) and 0 < self.router_top_p <= 1):
                yield f"router_top_p {self.router_top_p!r}: router 'topp' needs a probability above 0, at most 1"
            others = {"num_experts_per_tok": None, "router_pre_softmax": False, "router_scaling_factor": None}
        for name, unset in others.items():
            if getattr(self, name) != unset:
                yield f"{name} {getattr(self, name)!r} has no effect with router {self.router!r}: remove it"
        factor = self.router_scaling_factor
        if factor is not None and not (_is_number(factor, low=0) and factor > 0):
            yield f"router_scaling_factor {factor!r}: give a number above 0, or null"


def _is_count(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _is_number(value, low: float) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value >= low


__all__ = ["HMoEConfig"]
