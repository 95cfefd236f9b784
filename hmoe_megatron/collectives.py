"""What one rank does alone may fail there alone: these steps succeed or fail on all ranks, and none waits forever."""

import os
from collections.abc import Callable

import torch.distributed

from hmoe_megatron.launch.mpi import process_of


class StepFailed(Exception):
    """A step failed on a rank; raised on all of them, with the ranks and their reasons."""


def all_ranks[Result](step: Callable[[], Result]) -> list[Result]:
    """Run `step` on every rank; returns what each returned, in order of ranks. Raises StepFailed on all of them."""
    try:
        outcome = step(), None
    except Exception as error:
        outcome = None, f"{type(error).__name__}: {error}"
    outcomes = _gather(outcome)
    failures = [f"rank {rank}: {error}" for rank, (_, error) in enumerate(outcomes) if error is not None]
    if failures:
        raise StepFailed("; ".join(failures[:8]))
    return [result for result, _ in outcomes]


def run_on_rank0[Result](step: Callable[[], Result]) -> Result:
    """Run `step` on rank 0 and return what it returned on every rank. Raises StepFailed on all of them."""
    return all_ranks(lambda: step() if rank() == 0 else None)[0]


def rank() -> int:
    """This process's rank, also before process groups: by torchrun's environment, else mpirun's, else 0."""
    if torch.distributed.is_initialized():
        return torch.distributed.get_rank()
    given = os.environ.get("RANK", "")
    return int(given) if given.isdecimal() else (process_of(os.environ) or (0,))[0]


def world_size() -> int:
    """Number of ranks; 1 without process groups."""
    return torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1


def _gather(value) -> list:
    if world_size() == 1:
        return [value]
    values = [None] * world_size()
    torch.distributed.all_gather_object(values, value)
    return values
