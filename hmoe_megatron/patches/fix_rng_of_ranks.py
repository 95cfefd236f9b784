"""Random number generators in checkpoints, which Megatron-Core 0.19.2 gives back to the wrong rank."""

import dataclasses
import functools

from hmoe_megatron.patches.registry import patch, replace

# Of Megatron's arguments: what must be equal for a rank to find its own streams in a checkpoint.
LAYOUT = (
    "world_size",
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "context_parallel_size",
    "expert_model_parallel_size",
    "expert_tensor_parallel_size",
    "use_tp_pp_dp_mapping",
    "data_parallel_random_init",
)


@patch("fix")
def rng_of_ranks():
    """Save and load the generators of every rank. Megatron saves those of data-parallel rank 0 for all ranks of one
    tensor and pipeline rank. But expert-parallel ranks are data-parallel ranks too, and each has an expert stream of
    its own: after a resume all of them go on with rank 0's.

    Under another layout no rank finds its own streams: then none is loaded, and every rank goes on as a fresh run of
    the same seed begins (Megatron does so only for another tensor or pipeline size).
    """
    from megatron.training import checkpointing

    replace(checkpointing, "get_rng_state", _by_rank(checkpointing.get_rng_state))
    load = _with_own_streams_or_none(checkpointing._load_base_checkpoint)
    replace(checkpointing, "_load_base_checkpoint", load)


def _by_rank(stock):
    @functools.wraps(stock)
    def get_rng_state(ckpt_format, tp_group, pp_group, dp_cp_group=None, *args, **kwargs):
        from megatron.core import mpu
        from megatron.training import get_args

        state = stock(ckpt_format, tp_group, pp_group, dp_cp_group, *args, **kwargs)
        # With --data-parallel-random-init Megatron keeps a list of all data-parallel ranks.
        if ckpt_format != "torch_dist" or get_args().data_parallel_random_init:
            return state
        get_args().rng_state_by_rank = True  # goes into the checkpoint with all arguments
        group = dp_cp_group or mpu.get_data_parallel_group(with_context_parallel=True)
        return dataclasses.replace(
            state,
            global_shape=(*state.global_shape, group.size()),
            global_offset=(*state.global_offset, group.rank()),
            replica_id=0,
        )

    return get_rng_state


def _with_own_streams_or_none(stock):
    @functools.wraps(stock)
    def load(load_dir, args, rank0=False, *more, **kwargs):
        loaded = stock(load_dir, args, rank0, *more, **kwargs)
        saved = (loaded[0] or {}).get("args") if rank0 else None
        if saved is not None and not args.no_load_rng and not args.finetune and not saved.no_save_rng:
            reason = _difference(saved, args)
            if reason:
                _say_once(
                    f" random number generators are not loaded, and start as a fresh run's with --seed "
                    f"{args.seed}: {reason}"
                )
                saved.no_save_rng = True  # Megatron then does not look for them
        return loaded

    return load


def _difference(saved, args):
    """Why a rank can't find its own generators in the checkpoint of a run with the arguments `saved`; "" if it can."""
    different = [
        f"{name} {getattr(saved, name, None)} there, {getattr(args, name, None)} here"
        for name in LAYOUT
        if getattr(saved, name, None) != getattr(args, name, None)
    ]
    if not different and not saved.data_parallel_random_init and not getattr(saved, "rng_state_by_rank", False):
        different = ["the checkpoint has those of data-parallel rank 0 only"]
    return ", ".join(different)


@functools.cache
def _say_once(line):
    from megatron.training.utils import print_rank_0

    print_rank_0(line)
