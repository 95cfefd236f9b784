"""The distributed optimizer with torch's Adam: save before the first step, resume, and the step after it."""

import pytest
import torch

from hmoe_megatron.patches.fix_dataset_helpers import dataset_helpers
from hmoe_megatron.patches.fix_torch_adam import torch_adam_of_the_distributed_optimizer
from tests.distributed.ranks import run_ranks

STEPS = 4


def _ddp_and_optimizer():
    from megatron.core import parallel_state
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer.module import MegatronModule

    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel()
    config = TransformerConfig(num_layers=1, hidden_size=8, num_attention_heads=2)

    class Model(MegatronModule):
        def __init__(self):
            super().__init__(config)
            self.layers = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Tanh(), torch.nn.Linear(5, 3))

        def forward(self, rows):
            return self.layers(rows)

    torch.manual_seed(1)
    ddp = DistributedDataParallelConfig(use_distributed_optimizer=True)
    model = DistributedDataParallel(config, ddp, Model())
    adam = OptimizerConfig(optimizer="adam", lr=1e-2, use_distributed_optimizer=True)
    return model, get_megatron_optimizer(adam, [model])


def _step(model, optimizer, number):
    model.zero_grad_buffer()
    optimizer.zero_grad()
    generator = torch.Generator().manual_seed(100 * number + torch.distributed.get_rank())
    model(torch.randn(7, 6, generator=generator)).square().sum().backward()
    model.finish_grad_sync()
    optimizer.step()


def _weights(model):
    return [parameter.detach().clone() for parameter in model.parameters()]


def _saved(model, optimizer):
    """Everything of a checkpoint, by value: model, optimizer and its parameters' states."""
    (inner,) = optimizer.chained_optimizers
    state = inner.state_dict()
    return _weights(model), state, inner.get_parameter_state_dp_zero()


def _load(model, optimizer, saved):
    weights, state, parameter_state = saved
    with torch.no_grad():
        for parameter, weight in zip(model.parameters(), weights, strict=True):
            parameter.copy_(weight)
    (inner,) = optimizer.chained_optimizers
    inner.load_state_dict(state)
    inner.load_parameter_state_from_dp_zero(parameter_state)


def _resume_after(steps, repaired):
    """[weights of an unbroken run], [weights of a run that is broken after `steps`]."""
    assert not repaired or torch_adam_of_the_distributed_optimizer()
    whole = _ddp_and_optimizer()
    for number in range(STEPS):
        _step(*whole, number)
    first = _ddp_and_optimizer()
    for number in range(steps):
        _step(*first, number)
    saved = _saved(*first)
    second = _ddp_and_optimizer()
    _load(*second, saved)
    for number in range(steps, STEPS):
        _step(*second, number)
    return _weights(whole[0]), _weights(second[0])


@pytest.mark.parametrize("steps", [0, 1, 2])
def test_a_resumed_run_equals_the_unbroken_one(steps):
    for whole, resumed in run_ranks(2, _resume_after, steps, True):
        for expected, found in zip(whole, resumed, strict=True):
            assert torch.equal(expected, found)


def test_stock_asserts_before_its_first_step():
    with pytest.raises(AssertionError) as raised:
        run_ranks(2, _resume_after, 0, False)
    assert "assert len(steps) == 1" in "".join(raised.value.__notes__)


def test_stock_cannot_load_the_state_of_a_parameter():
    with pytest.raises(RuntimeError, match="leaf Variable that requires grad .* in-place"):
        run_ranks(2, _resume_after, 2, False)
    with pytest.raises(KeyError, match="step"):
        run_ranks(2, _resume_after_without_grad)


def _resume_after_without_grad():
    first, second = _ddp_and_optimizer(), _ddp_and_optimizer()
    _step(*first, 0)
    with torch.no_grad():
        _load(*second, _saved(*first))


def test_stock_shares_one_step():
    assert run_ranks(2, _tensors_of_step, False) == [1, 1]
    assert min(run_ranks(2, _tensors_of_step, True)) > 1


def _tensors_of_step(repaired):
    """How many different tensors the `step` of the parameters are after a load."""
    assert not repaired or torch_adam_of_the_distributed_optimizer()
    first, second = _ddp_and_optimizer(), _ddp_and_optimizer()
    _step(*first, 0)
    (inner,) = second[1].chained_optimizers
    inner.load_state_dict(first[1].chained_optimizers[0].state_dict())
    return len({id(state["step"]) for state in inner.optimizer.state.values()})


def test_repair_is_left_out_where_a_fused_adam_is_there():
    assert run_ranks(1, _repair_with_fused_adam) == [(False, True)]


def _repair_with_fused_adam():
    from megatron.core.optimizer import distrib_optimizer

    before = dict(vars(distrib_optimizer.DistributedOptimizer))
    distrib_optimizer.HAVE_APEX_OR_TE = True
    return torch_adam_of_the_distributed_optimizer(), dict(vars(distrib_optimizer.DistributedOptimizer)) == before


def test_a_second_repair_changes_nothing():
    assert run_ranks(1, _repair_twice) == [True]


def _repair_twice():
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    torch_adam_of_the_distributed_optimizer()
    before = dict(vars(DistributedOptimizer))
    return torch_adam_of_the_distributed_optimizer() and dict(vars(DistributedOptimizer)) == before


def test_dataset_helpers_are_not_compiled_where_there_is_no_makefile():
    assert run_ranks(1, _helpers) == [("make was run", True, None)]


def _helpers():
    import subprocess

    from megatron.core.datasets import utils

    def run(command):
        raise RuntimeError("make was run")

    subprocess.run = run
    try:
        utils.compile_helpers()
        stock = "nothing was run"
    except RuntimeError as error:
        stock = str(error)
    return stock, dataset_helpers(), utils.compile_helpers()
