"""The distributed optimizer with torch's Adam, that is without Transformer Engine and Apex."""

import functools

import torch

from hmoe_megatron.patches.registry import patch, replace


@patch("fix")
def torch_adam_of_the_distributed_optimizer():
    """With torch's Adam the distributed optimizer can neither save before its first step nor resume:
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
    owner = distrib_optimizer.DistributedOptimizer
    for name, repair in (
        ("state_dict", _with_state),
        ("load_state_dict", _with_own_steps),
        ("_set_main_param_and_optimizer_states", _without_step),
    ):
        replace(owner, name, repair(getattr(owner, name)))
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

    return state_dict


def _state_without_parameters(optimizer):
    groups = [
        {name: value for name, value in group.items() if name != "params"} | {"step": 0.0}
        for group in optimizer.optimizer.param_groups
    ]
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
