"""Optimizer state that Megatron-Core 0.19.2 saves wrongly or can't load, with a GPU or without, where buckets or the
experts of the ranks are unequal."""

import functools

import torch

from hmoe_megatron.patches.registry import patch, replace


@patch("fix")
def optimizer_checkpoints():
    """Where buckets or the experts of the ranks are unequal, Megatron saves the state of a parameter's neighbours,
    leaves out what a load asks for, or asks for what was not saved: each repair below says which."""
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
    from megatron.core.optimizer.optimizer import ChainedOptimizer, Float16OptimizerWithFloat16Params

    for owner, name, repair in (
        (DistributedOptimizer, "sharded_param_state_fully_reshardable", _by_padded_position),
        (ChainedOptimizer, "sharded_state_dict", _with_all_that_is_loaded),
        (ChainedOptimizer, "load_state_dict", _with_a_state_of_each),
        (Float16OptimizerWithFloat16Params, "sharded_state_dict", _with_masters_by_group),
        (Float16OptimizerWithFloat16Params, "load_state_dict", _from_masters_by_group),
    ):
        replace(owner, name, repair(getattr(owner, name)))


def _by_padded_position(stock):
    """Megatron gathers the buckets of a buffer without the padding at their ends, then cuts parameters out by their
    positions with it. Of every parameter behind the first padding it saves the state of its neighbours, and zeros at
    the end of the buffer (Megatron-LM's pull request 5077)."""

    @functools.wraps(stock)
    def sharded_param_state_fully_reshardable(self, *args, **kwargs):
        self.get_parameter_state_dp_zero = functools.partial(_gathered_with_padding, self)
        try:
            return stock(self, *args, **kwargs)
        finally:
            del self.get_parameter_state_dp_zero

    return sharded_param_state_fully_reshardable


def _gathered_with_padding(optimizer, **kwargs):
    gathered = type(optimizer).get_parameter_state_dp_zero(optimizer, **kwargs)
    for index, buffer in enumerate(optimizer.buffers if gathered else ()):
        for tensors in gathered[index].values():
            for name, value in tensors.items():
                if isinstance(value, torch.Tensor):
                    tensors[name] = _padded(value, buffer.buckets)
    return gathered


def _padded(flat, buckets):
    """`flat`, all buckets without their padding, as they lie in the buffer. Not copied where that is the same."""
    if all(bucket.numel_unpadded == bucket.grad_data.numel() for bucket in buckets[:-1]):
        return flat
    parts = []
    for bucket, part in zip(buckets, flat.split([bucket.numel_unpadded for bucket in buckets]), strict=True):
        parts += [part, part.new_zeros(bucket.grad_data.numel() - part.numel())]
    return torch.cat(parts)


def _with_all_that_is_loaded(stock):
    """A load asks for the moments of every parameter and for Adam's step, which a save may leave out:
    - before the first step, which may be after the first save in fp16, there are no moments, and step 0 is left out;
    - what ranks have in common is saved by rank 0, the step among it. An optimizer or a group of it that has no
      parameter on rank 0 has no step there: with torch's Adam the other ranks then can't load their experts' state,
      with a fused one they begin again at step 1. All optimizers of a chain step together."""

    @functools.wraps(stock)
    def sharded_state_dict(self, model_sharded_state_dict, is_loading=False, **kwargs):
        if not is_loading:
            for part in self.chained_optimizers:
                _allocate(part)
        state = stock(self, model_sharded_state_dict, is_loading, **kwargs)
        if len(self.chained_optimizers) > 1:
            _share_step(self.chained_optimizers, [part.get("optimizer", part) for part in state.values()])
        return state

    return sharded_state_dict


def _allocate(optimizer):
    """Zero moments for each parameter that has none, as a load makes them."""
    adam = optimizer.optimizer
    if optimizer.init_state_fn:
        optimizer.init_state_fn(adam, optimizer.config)
    if isinstance(adam, torch.optim.Adam):
        for state in adam.state.values():
            state.setdefault("step", torch.tensor(0.0))


def _share_step(optimizers, adams):
    """Put the step into each of `adams`, state dicts of torch's form: torch's Adam keeps one a parameter, which
    Megatron saves as `common_step`, and the distributed optimizer and the fused Adams one a group."""
    adams = [adam for adam in adams if isinstance(adam, dict)]  # a format tied to the layout holds no dict
    groups = [group for adam in adams for group in adam["param_groups"]]
    of_groups = [group["step"] for group in groups if group.get("step") is not None]
    for group in groups if of_groups else ():
        group["step"] = max(of_groups)
    of_parameters = [state["step"] for part in optimizers for state in part.optimizer.state.values() if "step" in state]
    for adam in adams if of_parameters else ():
        if "state" in adam:
            adam["state"]["common_step"] = max(of_parameters)


def _with_a_state_of_each(stock):
    """Of a `state` that holds tensors only, as that of a fused Adam, nothing is in common: a rank that asks for no
    tensor gets no `state`, and load_state_dict() reads it."""

    @functools.wraps(stock)
    def load_state_dict(self, state_dict):
        if len(self.chained_optimizers) > 1:
            for part in state_dict.values() if isinstance(state_dict, dict) else state_dict:
                part.get("optimizer", part).setdefault("state", {})
        return stock(self, state_dict)

    return load_state_dict


_MASTERS = "fp32_from_fp16_params"


def _with_masters_by_group(stock):
    """The fp32 masters are a list of lists, one a group. What is left of it on rank 0 after its tensors are taken out
    is saved for all ranks: nothing, or a list that is empty. A rank that has an empty group where rank 0 had none, or
    the other way round, can't load it. A dict of the groups that are not empty merges in every case."""

    @functools.wraps(stock)
    def sharded_state_dict(self, *args, **kwargs):
        state = stock(self, *args, **kwargs)
        state[_MASTERS] = {index: group for index, group in enumerate(state[_MASTERS]) if group}
        return state

    return sharded_state_dict


def _from_masters_by_group(stock):
    """The other way round."""

    @functools.wraps(stock)
    def load_state_dict(self, state_dict):
        groups = state_dict.get(_MASTERS, {})
        if isinstance(groups, dict):
            state_dict[_MASTERS] = [groups.get(index, []) for index in range(len(self.fp32_from_float16_groups))]
        return stock(self, state_dict)

    return load_state_dict
