"""Defects of Megatron-Core 0.19.2 that a machine with a GPU has as well. Each repair has its own
condition."""
import copy
import functools
import os

import torch


def repair_dataset_helpers():
    """True if repaired. compile_helpers() runs `make` in the package, and the wheel has the compiled helpers
    but no Makefile: the run would end there. Without a Makefile there is nothing to compile."""
    from megatron.core.datasets import utils
    if os.path.exists(os.path.join(os.path.dirname(utils.__file__), "Makefile")):
        return False
    utils.compile_helpers = lambda: None
    return True


def repair_sequence_parallel_norm():
    """True if repaired. torch's norm, the only one without Transformer Engine or Apex, is refused under sequence
    parallelism because nobody marks its parameters. Marked, their gradients are summed over the tensor parallel
    ranks as those of TE's are."""
    from megatron.core.transformer.torch_norm import WrappedTorchNorm
    stock = WrappedTorchNorm.__new__
    if not getattr(stock, "repaired", False):
        @functools.wraps(stock)
        def new(cls, config, *args, **kwargs):
            plain = copy.copy(config)
            plain.sequence_parallel = False
            norm = stock(cls, plain, *args, **kwargs)
            for parameter in norm.parameters():
                parameter.sequence_parallel = config.sequence_parallel
            return norm
        new.repaired = True
        WrappedTorchNorm.__new__ = new
    return True


def repair_distributed_optimizer():
    """True if repaired. With torch's Adam, that is without Transformer Engine and Apex, the distributed
    optimizer can neither save before its first step nor resume:
    - state_dict() asserts one `step` over all states, and there is no state yet, or never on a rank that holds no
      parameter;
    - _set_main_param_and_optimizer_states() copies into parameters that require a gradient, and copies every
      state from a checkpoint that does not hold `step`;
    - load_state_dict() gives all parameters one `step` tensor, which Adam then raises once for each of them:
      the second step after a resume is wrong in silence.
    """
    from megatron.core.optimizer import distrib_optimizer
    if distrib_optimizer.HAVE_APEX_OR_TE:
        return False
    optimizer = distrib_optimizer.DistributedOptimizer
    if not getattr(optimizer.state_dict, "repaired", False):
        optimizer.state_dict = _with_state(optimizer.state_dict)
        optimizer.load_state_dict = _with_own_steps(optimizer.load_state_dict)
        optimizer._set_main_param_and_optimizer_states = _without_step(
            optimizer._set_main_param_and_optimizer_states)
    return True


def _with_state(stock):
    @functools.wraps(stock)
    def state_dict(self):
        adam = self.optimizer
        if isinstance(adam, torch.optim.Adam):
            for parameter in (parameter for group in adam.param_groups for parameter in group["params"]):
                if not adam.state.get(parameter):
                    moments = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
                    adam.state[parameter] = {"step": torch.tensor(0.0), **moments}
        return stock(self) if adam.state else _state_without_parameters(self)
    state_dict.repaired = True
    return state_dict


def _state_without_parameters(optimizer):
    groups = [{name: value for name, value in group.items() if name != "params"} | {"step": 0.0}
              for group in optimizer.optimizer.param_groups]
    scaler = {"grad_scaler": optimizer.grad_scaler.state_dict()} if optimizer.grad_scaler else {}
    return {"optimizer": {"param_groups": groups}, **scaler}


def _with_own_steps(stock):
    @functools.wraps(stock)
    def load_state_dict(self, state_dict):
        stock(self, state_dict)
        for state in self.optimizer.state.values():
            if isinstance(state.get("step"), torch.Tensor):
                state["step"] = state["step"].clone()
    return load_state_dict


def _without_step(stock):
    @functools.wraps(stock)
    @torch.no_grad()
    def set_states(self, model_param, tensors):
        return stock(self, model_param, {"step": None, **tensors})
    return set_states
