"""torch's norm under sequence parallelism: refused by Megatron, marked for the sum over ranks by the repair."""

import pytest

from hmoe_megatron.patches.fix_sequence_parallel_norm import sequence_parallel_norm
from tests.distributed.ranks import run_ranks


def norms():
    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer.torch_norm import WrappedTorchNorm

    def config(normalization, sequence_parallel):
        return TransformerConfig(
            num_layers=1,
            hidden_size=8,
            num_attention_heads=2,
            normalization=normalization,
            tensor_model_parallel_size=2,
            sequence_parallel=sequence_parallel,
        )

    with pytest.raises(AssertionError, match="sequence parallel not supported"):
        WrappedTorchNorm(config=config("RMSNorm", True), hidden_size=8)
    assert sequence_parallel_norm() and sequence_parallel_norm()
    for normalization in ("RMSNorm", "LayerNorm"):
        for sequence_parallel in (True, False):
            given = config(normalization, sequence_parallel)
            norm = WrappedTorchNorm(config=given, hidden_size=8, eps=1e-3)
            assert type(norm).__name__ == normalization and norm.eps == 1e-3
            assert [parameter.sequence_parallel for parameter in norm.parameters()] == (
                [sequence_parallel] * len(list(norm.parameters()))
            )
            assert given.sequence_parallel == sequence_parallel
    given.sequence_parallel = given.memory_efficient_layer_norm = True
    with pytest.raises(AssertionError, match="memory_efficient"):
        WrappedTorchNorm(config=given, hidden_size=8)


def test_the_norm_is_marked_for_the_sum_over_tensor_parallel_ranks():
    run_ranks(1, norms)
