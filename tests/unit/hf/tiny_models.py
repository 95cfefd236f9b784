"""Tiny models of every kind that the tests of modeling_hmoe.py share."""

import torch

from hmoe_megatron.hf.configuration_hmoe import HMoEConfig
from hmoe_megatron.hf.modeling_hmoe import HMoEForCausalLM

TOP_K = {}
TOP_P = {"router": "topp", "num_experts_per_tok": None, "router_top_p": 0.6}
LOSSES = {"p_penalty_coeff": 0.1, "load_balance_coeff": 0.02, "router_entropy_coeff": 0.03}
# fp32 sums of some ten terms near 1, in another order.
FP32_BOUND = 1e-5


def tiny_config(**changes) -> HMoEConfig:
    """Two layers of unequal experts around a dense one."""
    return HMoEConfig(
        **{
            "vocab_size": 64,
            "hidden_size": 32,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "intermediate_size": 48,
            "max_position_embeddings": 64,
            "initializer_range": 0.2,
            "expert_widths": [[16, 24, 40, 8], [], [8, 8, 24]],
            "num_experts_per_tok": 2,
            **changes,
        }
    )


def tiny_model(seed: int = 0, **changes) -> HMoEForCausalLM:
    """In evaluation mode, with norms that are not all ones."""
    torch.manual_seed(seed)
    model = HMoEForCausalLM(tiny_config(**changes)).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name or name.endswith("bias"):
                weight.uniform_(0.5, 1.5)
    return model


def token_ids(rows: int = 2, length: int = 12, seed: int = 1) -> torch.Tensor:
    return torch.randint(0, 64, (rows, length), generator=torch.Generator().manual_seed(seed))


def gradients(model) -> dict[str, torch.Tensor]:
    return {name: weight.grad.clone() for name, weight in model.named_parameters()}
