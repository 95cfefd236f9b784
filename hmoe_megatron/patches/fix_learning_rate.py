"""A learning rate that changes at a resume."""

import functools

from hmoe_megatron.patches.registry import patch, replace

_RATES = ("max_lr", "min_lr")
# What a flag says of every group; the state dict's would come back in silence.
_OF_FLAGS = ("betas", "eps", "momentum", "nesterov")


@patch("fix")
def learning_rate_at_a_resume():
    """Megatron finds the groups of a saved optimizer by their learning rates among others, so that none can be changed,
    neither by --override-opt_param-scheduler nor by keeping the checkpoint's. Rates of groups that are the same
    otherwise are made equal first: to the run's, or with --use-checkpoint-opt_param-scheduler to the checkpoint's."""
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
    from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params, FP32Optimizer

    for owner in (DistributedOptimizer, Float16OptimizerWithFloat16Params, FP32Optimizer):
        replace(owner, "load_state_dict", _with_equal_rates(owner.load_state_dict))


def _with_equal_rates(stock):
    @functools.wraps(stock)
    def load_state_dict(self, state_dict):
        from megatron.training import get_args

        held = state_dict.get("optimizer", state_dict)
        if isinstance(held, dict) and "param_groups" in held:
            keeps = get_args().use_checkpoint_opt_param_scheduler
            for mine, saved in _paired(self.optimizer.param_groups, held["param_groups"]):
                of, to = (saved, mine) if keeps else (mine, saved)
                to |= {name: of[name] for name in (*_RATES, *_OF_FLAGS) if name in of and name in to}
        return stock(self, state_dict)

    return load_state_dict


def _paired(groups, saved_groups):
    """Groups of one kind belong together in the order of their rates, where there are as many on both sides."""
    kinds, saved_kinds = _by_kind(groups), _by_kind(saved_groups)
    for kind, members in kinds.items():
        saved = saved_kinds.get(kind, [])
        if len(members) == len(saved):
            yield from zip(members, saved, strict=True)


def _by_kind(groups):
    from megatron.core.optimizer.optimizer import param_group_identifier_keys

    kinds = {}
    for group in sorted(groups, key=lambda group: [group.get(name) or 0.0 for name in _RATES]):
        kind = tuple(
            group.get(f"pre_{key}", group.get(key)) for key in param_group_identifier_keys if key not in _RATES
        )
        kinds.setdefault(kind, []).append(group)
    return kinds
