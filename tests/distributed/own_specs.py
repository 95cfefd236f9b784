"""Layer specs as a user has them, for --spec."""

from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer.attention import SelfAttention


class HalvedAttention(SelfAttention):
    def forward(self, *args, **named):
        output, bias = super().forward(*args, **named)
        return output / 2, bias


def halved(config):
    experts = config.transformer.num_moe_experts
    spec = get_gpt_layer_local_spec(num_experts=experts, normalization="RMSNorm")
    spec.submodules.self_attention.module = HalvedAttention
    return spec


dense = get_gpt_layer_local_spec(normalization="RMSNorm")
