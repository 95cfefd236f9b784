"""torch's norm under sequence parallelism."""

import copy
import functools

from hmoe_megatron.patches.registry import patch, replace


@patch("fix")
def sequence_parallel_norm():
    """torch's norm, the only one without Transformer Engine or Apex, is refused under sequence parallelism because
    nobody marks its parameters. Marked, their gradients are summed over the tensor parallel ranks as those of
    TE's are."""
    from megatron.core.transformer.torch_norm import WrappedTorchNorm

    stock = WrappedTorchNorm.__new__

    @functools.wraps(stock)
    def new(cls, config, *args, **kwargs):
        plain = copy.copy(config)
        plain.sequence_parallel = False
        norm = stock(cls, plain, *args, **kwargs)
        for parameter in norm.parameters():
            parameter.sequence_parallel = config.sequence_parallel
        return norm

    replace(WrappedTorchNorm, "__new__", new)
