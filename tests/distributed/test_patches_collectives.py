"""Megatron's own collectives on gloo ranks, with unequal numbers of rows, forward and backward."""

import pytest
import torch

from hmoe_megatron.patches.fix_sequence_parallel_norm import sequence_parallel_norm
from tests.distributed.ranks import run_ranks

ROWS_SENT = ([1, 2], [3, 0])  # rank 0 keeps 1 row and sends 2; rank 1 sends 3 and keeps none
ROWS = {"unequal": [3, 1], "none on rank 1": [4, 0], "equal": [2, 2]}


def test_all_to_all_of_unequal_rows_and_its_backward():
    ranks = run_ranks(2, _all_to_all)
    # A row is (rank it came from, its number there). Rank 0 gets one of its own and three of rank 1.
    assert ranks[0][0] == [[0, 0], [1, 0], [1, 1], [1, 2]] and ranks[1][0] == [[0, 1], [0, 2]]
    # The gradient of a row comes back from where it went, here 10 * (rank it went to) + place there.
    assert ranks[0][1] == [0, 10, 11] and ranks[1][1] == [1, 2, 3]


def _all_to_all():
    from megatron.core.tensor_parallel import all_to_all

    rank = torch.distributed.get_rank()
    sent = torch.tensor([[rank, row] for row in range(3)], dtype=torch.float32, requires_grad=True)
    received = all_to_all(
        torch.distributed.group.WORLD,
        sent,
        torch.tensor([rows[rank] for rows in ROWS_SENT]),
        torch.tensor(ROWS_SENT[rank]),
    )
    (received[:, 0] * (10 * rank + torch.arange(len(received)))).sum().backward()
    return received.tolist(), sent.grad[:, 0].tolist()


@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sequence_parallel_gather_and_scatter_are_each_others_backward(rows, dtype):
    whole = torch.arange(8, dtype=dtype).view(4, 2)
    own = list(whole.split(rows))
    ranks = run_ranks(2, _gather_and_scatter, rows, dtype)
    for rank, (gathered, gathered_grad, scattered, scattered_grad) in enumerate(ranks):
        assert torch.equal(gathered, whole)
        # Each rank weighs the gathered rows by rank + 1: their sum comes back to the owner.
        assert torch.equal(gathered_grad, 3 * torch.ones_like(own[rank]))
        # Both ranks hold rank + 1 times the whole.
        assert torch.equal(scattered, 3 * own[rank])
        weights = torch.cat([torch.full_like(part, number + 1) for number, part in enumerate(own)])
        assert torch.equal(scattered_grad, weights)


def _gather_and_scatter(rows, dtype):
    from megatron.core.tensor_parallel import (
        gather_from_sequence_parallel_region,
        reduce_scatter_to_sequence_parallel_region,
    )

    rank, group = torch.distributed.get_rank(), torch.distributed.group.WORLD
    whole = torch.arange(8, dtype=dtype).view(4, 2)
    sizes = None if rows[0] == rows[1] else rows
    own = whole.split(rows)[rank].clone().requires_grad_()
    gathered = gather_from_sequence_parallel_region(own, group=group, output_split_sizes=sizes)
    (gathered * (rank + 1)).sum().backward()
    partial = (whole * (rank + 1)).requires_grad_()
    scattered = reduce_scatter_to_sequence_parallel_region(partial, group=group, input_split_sizes=sizes)
    (scattered * (rank + 1)).sum().backward()
    return gathered.detach(), own.grad, scattered.detach(), partial.grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_reductions_that_ddp_and_the_distributed_optimizer_use(dtype):
    for rank, (averaged, part, gathered) in enumerate(run_ranks(2, _reductions, dtype)):
        assert torch.equal(averaged, torch.full((4,), 1.5, dtype=dtype))
        assert torch.equal(part, torch.arange(4, dtype=dtype).view(2, 2)[rank] * 3)
        assert torch.equal(gathered, torch.tensor([0, 0, 1, 1], dtype=dtype))


def _reductions(dtype):
    rank = torch.distributed.get_rank()
    averaged = torch.full((4,), rank + 1, dtype=dtype)
    part, gathered = torch.zeros(2, dtype=dtype), torch.zeros(4, dtype=dtype)
    with torch.distributed._coalescing_manager(None, async_ops=True) as work:
        torch.distributed.reduce_scatter_tensor(part, torch.arange(4, dtype=dtype) * (rank + 1))
    work.wait()
    torch.distributed.all_reduce(averaged, op=torch.distributed.ReduceOp.AVG)
    torch.distributed.all_gather_into_tensor(gathered, torch.full((2,), rank, dtype=dtype))
    return averaged, part, gathered


def test_gradient_of_a_norm_under_sequence_parallelism_is_that_of_the_whole_sequence():
    hidden = _hidden()
    norm = torch.nn.RMSNorm(8, eps=1e-5)
    norm(hidden).pow(3).sum().backward()
    for grad in run_ranks(2, _norm_gradient):
        torch.testing.assert_close(grad, norm.weight.grad, rtol=1e-6, atol=1e-6)  # another order of sums


def _hidden():
    return torch.linspace(-2, 3, 64).view(8, 8).sin()


def _norm_gradient():
    from megatron.core import parallel_state
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer.module import MegatronModule
    from megatron.core.transformer.torch_norm import WrappedTorchNorm

    parallel_state.initialize_model_parallel(tensor_model_parallel_size=2)
    sequence_parallel_norm()
    config = TransformerConfig(
        num_layers=1,
        hidden_size=8,
        num_attention_heads=2,
        normalization="RMSNorm",
        tensor_model_parallel_size=2,
        sequence_parallel=True,
    )

    class Model(MegatronModule):
        def __init__(self):
            super().__init__(config)
            self.norm = WrappedTorchNorm(config=config, hidden_size=8)
            self.share_embeddings_and_output_weights = False

        def forward(self, hidden):
            return self.norm(hidden)

    model = DistributedDataParallel(config, DistributedDataParallelConfig(), Model())
    model.zero_grad_buffer()
    model(_hidden().chunk(2)[torch.distributed.get_rank()]).pow(3).sum().backward()
    finalize_model_grads([model])
    return model.module.norm.weight.main_grad.clone()
