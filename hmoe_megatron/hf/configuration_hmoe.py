"""Configuration of an HMoE language model: a LLaMA-like decoder whose experts differ in width (arXiv 2408.10681)."""

from transformers import PreTrainedConfig

from .hmoe_layer import COUNT, experts_problem, is_count, is_number, router_problems, value_problems


class HMoEConfig(PreTrainedConfig):
    """Settings of HMoEForCausalLM, checked when made: ValueError names the field, its value and the remedy.

    expert_widths: for each layer the width of each of its experts; [] for a dense layer of width ``intermediate_size``.
    router: "topk" (``num_experts_per_tok`` experts a token) or "topp" (the fewest whose probabilities reach
    ``router_top_p``, at most ``max_experts_per_token``). A field named top_p would set generate()'s nucleus sampling.
    router_pre_softmax: softmax over all experts before Top-K, not renormalised after it. router_scaling_factor:
    multiplies the weights of Top-K. router_dtype: "float32" computes the router's logits in float32, None in the
    model's dtype. expert_path: "sorted" or the slower reference "loop", see hmoe_layer.py.
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
        if self.head_dim is None and is_count(self.hidden_size) and is_count(self.num_attention_heads):
            self.head_dim = self.hidden_size // self.num_attention_heads
        super().__post_init__(**kwargs)
        self.check()

    def check(self):
        """Raises ValueError with every problem. The model calls it too: from_pretrained sets fields after __init__."""
        problems = [*self._shape_problems(), *value_problems(self), *self._number_problems()]
        if not problems:
            has_experts = isinstance(self.expert_widths, list | tuple) and any(self.expert_widths)
            problems = [*self._width_problems(), *router_problems(self, has_experts)]
        if problems:
            raise ValueError("HMoEConfig: " + "\n".join(problems))

    def _shape_problems(self):
        counts = (
            "vocab_size hidden_size num_hidden_layers num_attention_heads num_key_value_heads head_dim "
            "max_position_embeddings"
        )
        for name in (*counts.split(), "intermediate_size"):
            value = getattr(self, name)
            if not is_count(value) and not (value is None and name == "intermediate_size"):
                yield f"{name} {value!r}: {COUNT}"
        heads, groups = self.num_attention_heads, self.num_key_value_heads
        if is_count(heads) and is_count(groups) and heads % groups:
            yield f"num_attention_heads {heads} is no multiple of num_key_value_heads {groups}: give a divisor"
        if is_count(self.head_dim) and self.head_dim % 2:
            yield f"head_dim {self.head_dim} is odd: RoPE turns pairs, give an even number"

    def _number_problems(self):
        if self.hidden_act != "silu":
            yield f"hidden_act {self.hidden_act!r} is not known: give one of 'silu'"
        if not is_number(self.initializer_range, low=0):
            yield f"initializer_range {self.initializer_range!r}: give a finite number, 0 or more"
        if not (is_number(self.attention_dropout, low=0) and self.attention_dropout < 1):
            yield f"attention_dropout {self.attention_dropout!r}: give a probability below 1"
        if not (is_number(self.rms_norm_eps, low=0) and self.rms_norm_eps > 0):
            yield f"rms_norm_eps {self.rms_norm_eps!r}: give a number above 0"
        theta = (self.rope_parameters or {}).get("rope_theta")
        if not (is_number(theta, low=0) and theta > 0):
            yield f"rope_parameters {self.rope_parameters!r}: give rope_theta, a number above 0"

    def _width_problems(self):
        layers = self.expert_widths
        if not isinstance(layers, list | tuple) or len(layers) != self.num_hidden_layers:
            given = f"of {len(layers)} layers" if isinstance(layers, list | tuple) else repr(layers)
            yield f"expert_widths {given}, num_hidden_layers is {self.num_hidden_layers}: give a list of widths a layer"
            return
        for layer, widths in enumerate(layers):
            if not isinstance(widths, list | tuple) or not all(map(is_count, widths)):
                yield f"expert_widths[{layer}] {widths!r}: give whole numbers of at least 1, [] if it is dense"
            elif not widths and self.intermediate_size is None:
                yield f"expert_widths[{layer}] is [], a dense layer, and intermediate_size is None: give its width"
            elif widths and (problem := experts_problem(self, widths, f"expert_widths[{layer}]")):
                yield problem


__all__ = ["HMoEConfig"]
