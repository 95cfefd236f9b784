"""Multi-latent attention without Transformer Engine."""

import functools

from hmoe_megatron.patches.registry import patch, replace


@patch("fix")
def head_sizes_of_latent_attention():
    """Megatron's local spec of multi-latent attention builds DotProductAttention with the sizes of its heads, which it
    does not take; and its output would have the width of other heads."""
    from megatron.core.transformer.dot_product_attention import DotProductAttention

    stock = DotProductAttention.__init__

    @functools.wraps(stock)
    def init(self, *args, k_channels: int | None = None, v_channels: int | None = None, **named):
        stock(self, *args, **named)
        if v_channels is not None:
            self.hidden_size_per_partition = v_channels * self.num_attention_heads_per_partition

    replace(DotProductAttention, "__init__", init)


@patch("fix")
def key_positions_of_latent_attention():
    """Where the way down to the latent vectors is divided by tensor parallelism, the heads of every rank use the same
    part of the keys, that which knows the position, and Megatron does not add up their gradients. Gathered before it
    gathers and scattered over the sequence (without sequence parallelism such a run is refused), it takes the way of
    Transformer Engine's layers, which adds them up."""
    from megatron.core.tensor_parallel import mappings
    from megatron.core.transformer.multi_latent_attention import MLASelfAttention

    stock = MLASelfAttention._qkv_down_projection

    @functools.wraps(stock)
    def down(self, hidden_states):
        q_compressed, kv_combined = stock(self, hidden_states)
        if kv_combined.size(-1) != self.config.kv_lora_rank + self.config.qk_pos_emb_head_dim:
            kv_combined = mappings.gather_from_tensor_model_parallel_region(kv_combined)
            kv_combined = mappings.scatter_to_sequence_parallel_region(kv_combined)
        return q_compressed, kv_combined

    replace(MLASelfAttention, "_qkv_down_projection", down)
