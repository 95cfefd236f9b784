"""How fast a run is, by Megatron's own clock and its count of FLOPs."""

import argparse


def tokens_per_s(args: argparse.Namespace, steps: int) -> float:
    """Of so many last steps, on all ranks; evaluation and saving between them do not count."""
    from megatron.core.num_microbatches_calculator import get_current_global_batch_size
    from megatron.training import get_timers

    elapsed_s = get_timers()("interval-time").elapsed(reset=False)
    return steps * get_current_global_batch_size() * args.seq_length / elapsed_s


def step_flops(args: argparse.Namespace, samples: int) -> float:
    """Of one step on all ranks, forward and backward, by the widths that tokens activated."""
    from megatron.training import training as stock

    return stock.num_floating_point_operations(args, samples)
