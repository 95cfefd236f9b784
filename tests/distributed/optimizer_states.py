"""What a run holds beside its weights, in a form in which ranks can be put together and compared."""

import hashlib
import itertools
import pickle
import random

import numpy as np
import torch


def states_of(optimizer):
    """(model parameter, {kind: tensor of its shape}) of one of Megatron's optimizers, as far as this rank holds them:
    ``param`` (the fp32 master), ``exp_avg``, ``exp_avg_sq``. NaN where another rank holds the element."""
    if hasattr(optimizer, "model_param_group_index_map"):
        for parameter in optimizer.model_param_group_index_map:
            held = optimizer._get_model_param_range_map(parameter)["param"]
            tensors = optimizer._get_main_param_and_optimizer_states(parameter)
            yield parameter, {name: _placed(value, held, parameter) for name, value in _per_element(tensors)}
        return
    if hasattr(optimizer, "float16_groups"):
        model = list(itertools.chain(*optimizer.float16_groups, *optimizer.fp32_from_fp32_groups))
        main = list(itertools.chain(*optimizer.fp32_from_float16_groups, *optimizer.fp32_from_fp32_groups))
    else:
        model = main = optimizer.get_parameters()
    for parameter, master in zip(model, main, strict=True):
        state = optimizer.optimizer.state.get(master, {})
        yield parameter, {"param": master.detach(), **dict(_per_element(state))}


def _per_element(state):
    """Adam's moments, without its step."""
    return [(name, value) for name, value in state.items() if isinstance(value, torch.Tensor) and value.dim()]


def _placed(value, held, parameter):
    flat = torch.full((parameter.numel(),), float("nan"))
    flat[held.start : held.end] = value.detach()
    return flat.view(parameter.shape)


def run_state(args, scheduler, optimizer):
    """Scheduler, learning rates, data position, Adam's steps, and a hash of every generator of this rank."""
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    generators = {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state().tolist(),
        **{name: state.tolist() for name, state in get_cuda_rng_tracker().get_states().items()},
    }
    inner = [part.optimizer for part in optimizer.chained_optimizers]
    # torch's Adam has a step of every parameter, a fused one of every group.
    holders = [holder for adam in inner for holder in (*adam.state.values(), *adam.param_groups) if "step" in holder]
    return {
        "scheduler": scheduler.state_dict(),
        "learning_rates": sorted({group["lr"] for adam in inner for group in adam.param_groups}),
        "consumed_samples": args.consumed_train_samples,
        "adam_steps": sorted({float(holder["step"]) for holder in holders}),
        "rng": {name: hashlib.sha256(pickle.dumps(state)).hexdigest() for name, state in generators.items()},
    }
