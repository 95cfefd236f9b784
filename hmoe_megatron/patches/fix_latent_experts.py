"""Experts of a latent size (--moe-latent-size) without Transformer Engine."""

import torch

from hmoe_megatron.patches.registry import patch, replace


class ReplicatedLinear(torch.nn.Module):
    """y = x W^T, [..., in] to [..., out], W on every tensor-parallel rank. Takes what Megatron gives to Transformer
    Engine's linear layer of parallel mode "duplicated", and returns (y, None) as that does."""

    def __init__(self, input_size: int, output_size: int, *, config, init_method, bias: bool, **of_engine):
        super().__init__()
        assert not bias, "--disable-bias-linear is required"
        device = torch.device("cpu") if config.use_cpu_initialization else torch.cuda.current_device()
        weight = torch.empty(output_size, input_size, device=device, dtype=config.params_dtype)
        self.weight = torch.nn.Parameter(weight)
        if config.perform_initialization:
            init_method(self.weight)
        # Each tensor-parallel rank has seen its part of the sequence only: Megatron adds the gradients up.
        self.weight.sequence_parallel = config.sequence_parallel

    def forward(self, x: torch.Tensor):
        return torch.nn.functional.linear(x, self.weight), None


@patch("fix")
def latent_projections_of_experts():
    """MoELayer takes the projections to --moe-latent-size and back from Transformer Engine, and refuses to be built
    without it."""
    from megatron.core.transformer.moe import moe_layer

    if moe_layer.HAVE_TE:
        return False
    replace(moe_layer, "HAVE_TE", True)  # read there for these projections only, and under FP8
    replace(moe_layer, "TELinear", ReplicatedLinear)
    return True
