"""HMoE language model for transformers: LLaMA-like attention, experts of different widths, Top-K or Top-P routing.

Its layer of experts is hmoe_layer.py. Legend: B rows of the batch, S positions, T = B S tokens, H hidden size,
E experts of a layer, N heads, D width of a head, V vocabulary.
"""

import torch
from torch import nn
from transformers import DynamicCache, GenerationMixin, PreTrainedModel
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import MoeCausalLMOutputWithPast, MoeModelOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb, eager_attention_forward
from transformers.utils import can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .configuration_hmoe import HMoEConfig
from .hmoe_layer import HMoEBlock, HMoEMLP, HMoERouter, router_loss


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
