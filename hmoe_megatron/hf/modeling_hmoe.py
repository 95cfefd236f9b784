"""HMoE language model for transformers: LLaMA-like attention, experts of different widths, Top-K or Top-P routing.

Legend: B rows of the batch, S positions, T = B S tokens, H hidden size, E experts of a layer, K experts a token,
R routed rows (token, expert), N heads, D width of a head, V vocabulary.
"""

import torch
from torch import nn
from transformers import DynamicCache, GenerationMixin, PreTrainedModel
from transformers.activations import ACT2FN
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import MoeCausalLMOutputWithPast, MoeModelOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb, eager_attention_forward
from transformers.utils import can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .configuration_hmoe import HMoEConfig


def top_k_routing(
    logits_TE: torch.Tensor, k: int, pre_softmax: bool = False, scaling_factor: float | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """(weights_TE in the dtype of the logits, routing_map_TE bool) of the K largest logits; softmax in float32.

    pre_softmax False: softmax over the K logits. True: over all E, then Top-K, not renormalised. Arithmetic, ties
    and order of sums are those of Megatron-Core's topk_routing_with_score_function.
    """
    scores_TE = torch.softmax(logits_TE, dim=-1, dtype=torch.float32) if pre_softmax else logits_TE
    # Megatron sorts only where gradients are on, and the order shows in the last bit of the softmax and in ties.
    scores_TK, expert_TK = torch.topk(scores_TE, k, dim=1, sorted=torch.is_grad_enabled())
    weights_TK = scores_TK if pre_softmax else torch.softmax(scores_TK, dim=-1, dtype=torch.float32)
    if scaling_factor is not None:
        weights_TK = weights_TK * scaling_factor
    weights_TE = torch.zeros_like(logits_TE).scatter(1, expert_TK, weights_TK.type_as(logits_TE))
    return weights_TE, torch.zeros_like(logits_TE, dtype=torch.bool).scatter(1, expert_TK, True)


def top_p_routing(
    logits_TE: torch.Tensor, top_p: float, max_experts: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """(weights_TE in the dtype of the logits, routing_map_TE bool): the fewest experts a token whose probabilities, a
    float32 softmax over all E, add up to ``top_p`` (arXiv 2403.07652), renormalised.

    A token has one expert or more, at most ``max_experts``; among equal probabilities the lower expert wins.
    """
    probs_TE = torch.softmax(logits_TE, dim=-1, dtype=torch.float32)
    sorted_TE, order_TE = probs_TE.sort(dim=-1, descending=True, stable=True)
    keep_TE = (sorted_TE.cumsum(dim=-1) - sorted_TE) < top_p
    keep_TE[:, 0] = True  # also where a NaN makes every comparison false
    if max_experts is not None:
        keep_TE[:, max_experts:] = False
    routing_map_TE = torch.zeros_like(keep_TE).scatter(1, order_TE, keep_TE)
    chosen_TE = probs_TE * routing_map_TE
    return (chosen_TE / chosen_TE.sum(dim=-1, keepdim=True)).type_as(logits_TE), routing_map_TE


def route(logits_TE: torch.Tensor, config: HMoEConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """(weights_TE, routing_map_TE) by the router that the configuration names."""
    if config.router == "topp":
        return top_p_routing(logits_TE, config.router_top_p, config.max_experts_per_token)
    return top_k_routing(logits_TE, config.num_experts_per_tok, config.router_pre_softmax, config.router_scaling_factor)


def router_loss(
    logits_TE: torch.Tensor, widths_E: list[int], valid_T: torch.Tensor | None, config: HMoEConfig
) -> torch.Tensor:
    """Losses of one layer's router times their coefficients, a float32 scalar.

    With T_i tokens that chose expert i of T (a count, no gradient), Phat_i its mean probability, h_i its width over the
    mean width: P-Penalty E sum_i (T_i / T) h_i Phat_i (arXiv 2408.10681, eq. 4), load balance the same with
    h_i = 1 (eq. 3), router entropy the mean over tokens of -sum_i P_i log P_i (arXiv 2403.07652, eq. 7).
    valid_T: False for padding, which is not counted; None counts every token.
    """
    counted_TE = route(logits_TE.detach(), config)[1]
    log_probs_TE = torch.log_softmax(logits_TE, dim=-1, dtype=torch.float32)
    probs_TE = log_probs_TE.exp()
    entropy_T = -(probs_TE * log_probs_TE).sum(dim=-1)
    num_experts, num_tokens = len(widths_E), logits_TE.shape[0]
    if valid_T is not None:
        counted_TE, probs_TE = counted_TE & valid_T.unsqueeze(-1), probs_TE * valid_T.unsqueeze(-1)
        entropy_T, num_tokens = entropy_T * valid_T, valid_T.sum()
    counts_E, prob_sum_E = counted_TE.sum(dim=0).float(), probs_TE.sum(dim=0)
    width_E = torch.tensor(widths_E, device=logits_TE.device)
    weight_E = config.p_penalty_coeff * (width_E / width_E.float().mean()) + config.load_balance_coeff
    balance = (prob_sum_E * counts_E * weight_E).sum() * num_experts / (num_tokens * num_tokens)
    return balance + config.router_entropy_coeff * entropy_T.sum() / num_tokens


class HMoEMLP(nn.Module):
    """y = W_down (p * silu(W_gate x) * (W_up x)): an expert, p its routing weight, or a dense layer, no p."""

    def __init__(self, config: HMoEConfig, width: int):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, width, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, width, bias=False)
        self.down_proj = nn.Linear(width, config.hidden_size, bias=False)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, x: torch.Tensor, p_R: torch.Tensor | None = None) -> torch.Tensor:
        hidden = self.act_fn(self.gate_proj(x)) * self.up_proj(x)
        if p_R is not None:
            hidden = (hidden * p_R.unsqueeze(-1)).to(hidden.dtype)
        return self.down_proj(hidden)


def loop_path(experts, x_TH, weights_TE, routing_map_TE):
    """y_TH, the sum of each token's experts: the reference, one expert after the other."""
    y_TH = torch.zeros_like(x_TH)
    for index, expert in enumerate(experts):
        token_R = routing_map_TE[:, index].nonzero().squeeze(-1)
        y_RH = expert(x_TH[token_R], weights_TE[token_R, index])
        y_TH.index_add_(0, token_R, y_RH.to(y_TH.dtype))
    return y_TH


def sorted_path(experts, x_TH, weights_TE, routing_map_TE):
    """As loop_path: rows are sorted by expert once and added up once; without gradients unchosen experts don't run."""
    expert_R, token_R = routing_map_TE.t().nonzero(as_tuple=True)
    rows_E = routing_map_TE.sum(dim=0).tolist()
    x_RH, p_R = x_TH[token_R], weights_TE[token_R, expert_R]
    # With gradients they run on no rows: every weight gets a gradient, as DistributedDataParallel expects.
    y_RH = torch.cat(
        [
            expert(x, p)
            for expert, x, p in zip(experts, x_RH.split(rows_E), p_R.split(rows_E), strict=True)
            if len(x) or torch.is_grad_enabled()
        ]
    )
    return torch.zeros_like(x_TH).index_add_(0, token_R, y_RH.to(x_TH.dtype))


EXPERT_PATHS = {"sorted": sorted_path, "loop": loop_path}


class HMoERouter(nn.Module):
    """Logits of the experts, in the model's dtype or float32; not an nn.Linear, so that it is never quantised."""

    def __init__(self, config: HMoEConfig, num_experts: int):
        super().__init__()
        self.in_float32 = config.router_dtype == "float32"
        self.weight = nn.Parameter(torch.empty(num_experts, config.hidden_size))

    def forward(self, x_TH: torch.Tensor) -> torch.Tensor:
        if not self.in_float32:
            return nn.functional.linear(x_TH, self.weight)
        with torch.autocast(x_TH.device.type, enabled=False):
            return nn.functional.linear(x_TH.float(), self.weight.float())


class HMoEBlock(nn.Module):
    """Router and experts of one layer."""

    def __init__(self, config: HMoEConfig, widths_E: list[int]):
        super().__init__()
        self.config = config
        self.gate = HMoERouter(config, len(widths_E))
        self.experts = nn.ModuleList(HMoEMLP(config, width) for width in widths_E)

    def forward(self, x_BSH: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(y_BSH, logits_TE)."""
        x_TH = x_BSH.reshape(-1, x_BSH.shape[-1])
        logits_TE = self.gate(x_TH)
        y_TH = EXPERT_PATHS[self.config.expert_path](self.experts, x_TH, *route(logits_TE, self.config))
        return y_TH.view_as(x_BSH), logits_TE


class HMoEAttention(nn.Module):
    """Causal grouped-query attention with half-split RoPE, by any of transformers' attention backends."""

    def __init__(self, config: HMoEConfig, layer_idx: int):
        super().__init__()
        hidden, dim, bias = config.hidden_size, config.head_dim, config.attention_bias
        self.config, self.layer_idx, self.head_dim, self.is_causal = config, layer_idx, dim, True
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.q_proj = nn.Linear(hidden, config.num_attention_heads * dim, bias=bias)
        self.k_proj = nn.Linear(hidden, config.num_key_value_heads * dim, bias=bias)
        self.v_proj = nn.Linear(hidden, config.num_key_value_heads * dim, bias=bias)
        self.o_proj = nn.Linear(config.num_attention_heads * dim, hidden, bias=False)
        self.q_norm = nn.RMSNorm(dim, eps=config.rms_norm_eps) if config.use_qk_norm else nn.Identity()
        self.k_norm = nn.RMSNorm(dim, eps=config.rms_norm_eps) if config.use_qk_norm else nn.Identity()

    def forward(self, x_BSH, cos_sin, attention_mask, past_key_values=None, **kwargs):
        """(y_BSH, attention weights, None from backends that don't have them)."""
        q_BNSD = self.q_norm(self.q_proj(x_BSH).unflatten(-1, (-1, self.head_dim))).transpose(1, 2)
        k_BNSD = self.k_norm(self.k_proj(x_BSH).unflatten(-1, (-1, self.head_dim))).transpose(1, 2)
        v_BNSD = self.v_proj(x_BSH).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        q_BNSD, k_BNSD = apply_rotary_pos_emb(q_BNSD, k_BNSD, *cos_sin)
        if past_key_values is not None:
            k_BNSD, v_BNSD = past_key_values.update(k_BNSD, v_BNSD, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        dropout = self.config.attention_dropout if self.training else 0.0
        y_BSND, weights = attend(
            self, q_BNSD, k_BNSD, v_BNSD, attention_mask, dropout=dropout, scaling=self.head_dim**-0.5, **kwargs
        )
        return self.o_proj(y_BSND.flatten(-2)), weights


class HMoEDecoderLayer(GradientCheckpointingLayer):
    """x + attention(norm(x)), then x + experts(norm(x)) or, in a dense layer, x + MLP(norm(x))."""

    def __init__(self, config: HMoEConfig, layer_idx: int):
        super().__init__()
        widths_E = config.expert_widths[layer_idx]
        self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn = HMoEAttention(config, layer_idx)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = HMoEBlock(config, widths_E) if widths_E else HMoEMLP(config, config.intermediate_size)

    def forward(self, x_BSH, cos_sin, attention_mask, past_key_values=None, **kwargs):
        """(y_BSH, logits_TE of the router, None in a dense layer).

        The logits are an output, not caught by a hook: they keep their gradient under either kind of checkpointing.
        """
        y_BSH, _ = self.self_attn(self.input_layernorm(x_BSH), cos_sin, attention_mask, past_key_values, **kwargs)
        x_BSH = x_BSH + y_BSH
        y_BSH = self.mlp(self.post_attention_layernorm(x_BSH))
        y_BSH, logits_TE = y_BSH if isinstance(y_BSH, tuple) else (y_BSH, None)
        return x_BSH + y_BSH, logits_TE


class HMoEPreTrainedModel(PreTrainedModel):
    """What transformers asks of every model.

    No _supports_attention_backend: vLLM believes it, and would fuse the experts as if of one width.
    """

    config_class = HMoEConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["HMoEDecoderLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _can_record_outputs = {"hidden_states": HMoEDecoderLayer, "attentions": HMoEAttention}

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, HMoERouter):
            nn.init.normal_(module.weight, std=self.config.initializer_range)


class HMoEModel(HMoEPreTrainedModel):
    """Embedding, decoder layers, final norm."""

    def __init__(self, config: HMoEConfig):
        config.check()
        super().__init__(config)
        # No padding_idx: where the padding token is the end of text, its embedding would not be trained.
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(HMoEDecoderLayer(config, index) for index in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = LlamaRotaryEmbedding(config)
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values=None,
        inputs_embeds: torch.FloatTensor | None = None,
        use_cache: bool | None = None,
        output_router_logits: bool | None = None,
        **kwargs,
    ) -> MoeModelOutputWithPast:
        """router_logits: logits_TE of each layer with experts. Raises ValueError unless given ids or embeddings."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds, not both and not none")
        if output_router_logits is None:
            output_router_logits = self.config.output_router_logits
        x_BSH = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        if position_ids is None:
            past = 0 if past_key_values is None else past_key_values.get_seq_length()
            position_ids = torch.arange(past, past + x_BSH.shape[1], device=x_BSH.device).unsqueeze(0)
        mask = create_causal_mask(
            config=self.config,
            inputs_embeds=x_BSH,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            position_ids=position_ids,
        )
        cos_sin = self.rotary_emb(x_BSH, position_ids)
        router_logits = []
        for layer in self.layers:
            x_BSH, logits_TE = layer(
                x_BSH, cos_sin, mask, past_key_values=past_key_values, position_ids=position_ids, **kwargs
            )
            if output_router_logits and logits_TE is not None:
                router_logits.append(logits_TE)
        return MoeModelOutputWithPast(
            last_hidden_state=self.norm(x_BSH),
            past_key_values=past_key_values,
            router_logits=tuple(router_logits) if output_router_logits else None,
        )


class HMoEForCausalLM(HMoEPreTrainedModel, GenerationMixin):
    """HMoEModel and the matrix that gives the next token's logits."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: HMoEConfig):
        super().__init__(config)
        self.model = HMoEModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values=None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs,
    ) -> MoeCausalLMOutputWithPast:
        """logits_BSV, and with ``labels`` (-100: no target) the mean cross entropy of the next token.

        logits_to_keep: the last so many positions, 0: all, or the positions themselves. With output_router_logits
        (here or in the configuration) in training or with labels, ``aux_loss`` is router_loss summed over the layers,
        and part of ``loss``.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            return_dict=True,
            **kwargs,
        )
        x_BSH = outputs.last_hidden_state
        if isinstance(logits_to_keep, int):
            kept_BSH = x_BSH[:, -logits_to_keep:]
        else:
            kept_BSH = x_BSH.index_select(1, logits_to_keep)
        logits_BSV = self.lm_head(kept_BSH)
        aux_loss = loss = None
        if outputs.router_logits and (self.training or labels is not None):
            aux_loss = self._router_loss(outputs.router_logits, attention_mask, x_BSH.shape[1])
        if labels is not None:
            loss = self.loss_function(logits_BSV, labels, vocab_size=self.config.vocab_size, **kwargs)
            if aux_loss is not None:
                loss = loss + aux_loss.to(loss.device) * _share_of_step(labels, kwargs.get("num_items_in_batch"))
        return MoeCausalLMOutputWithPast(
            loss=loss,
            aux_loss=aux_loss,
            logits=logits_BSV,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            router_logits=outputs.router_logits,
        )

    def _router_loss(self, router_logits, attention_mask, length: int):
        valid_T = None
        if attention_mask is not None:
            if attention_mask.ndim != 2:
                raise ValueError(
                    f"output_router_logits with an attention_mask of shape {tuple(attention_mask.shape)}: padding must "
                    "not count in the router's losses, give a mask [batch, positions], or output_router_logits=False"
                )
            valid_T = attention_mask[:, -length:].reshape(-1).bool()
        widths = [widths_E for widths_E in self.config.expert_widths if widths_E]
        losses = [
            router_loss(logits_TE, widths_E, valid_T if valid_T is None else valid_T.to(logits_TE.device), self.config)
            for logits_TE, widths_E in zip(router_logits, widths, strict=True)
        ]
        return sum(loss.to(losses[0].device) for loss in losses)


def _share_of_step(labels, num_items_in_batch):
    """Under gradient accumulation the cross entropy is a sum over this batch's targets divided by those of the step;
    this batch's share of the targets weighs its router losses alike."""
    if num_items_in_batch is None:
        return 1.0
    return (labels[..., 1:] != -100).sum() / num_items_in_batch


__all__ = ["HMoEForCausalLM", "HMoEModel", "HMoEPreTrainedModel"]
