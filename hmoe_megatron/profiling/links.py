"""All-to-all with unequal splits, as the dispatcher uses it: rows go to their ranks and come back.

Letters: R ranks of the job, H hidden size.
"""

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from scipy.optimize import nnls

ROWS_SENT = (64, 256, 1024, 4096)  # by each rank
ROWS_KEPT_APART = (128, 512, 2048)
SKEW_TO_FIT, SKEW_KEPT_APART = 1.0, 0.5  # the last of n ranks gets (1 + skew) / (1 - skew / n) times the first's rows
ROUNDS = 8


@dataclass(frozen=True)
class Link:
    """bytes_per_s: what the fullest rank receives from others; errors: predicted over measured, minus 1."""

    bytes_per_s: float
    errors: np.ndarray
    errors_apart: np.ndarray


def ranks_per_node() -> int:
    """As torchrun numbers ranks: node after node."""
    size = int(os.environ.get("LOCAL_WORLD_SIZE", dist.get_world_size()))
    if dist.get_world_size() % size:
        raise ValueError(f"{dist.get_world_size()} ranks on nodes of {size}: start as many ranks on each node "
                         "(torchrun --nproc-per-node)")
    return size


def measure_links(hidden_size: int, device: torch.device, dtype: torch.dtype) -> tuple[Link | None, Link | None]:
    """(inside a node, across): None where no two ranks of the job are so linked. All ranks call it."""
    ranks, local = dist.get_world_size(), ranks_per_node()
    node = dist.get_rank() // local
    own = [rank for rank in range(ranks) if rank // local == node]
    others = [rank for rank in range(ranks) if rank // local != node]
    row_bytes = hidden_size * dtype.itemsize
    return (_link(own, row_bytes, hidden_size, device, dtype) if local > 1 else None,
            _link(others, row_bytes, hidden_size, device, dtype) if ranks > local else None)


def _link(partners: Sequence[int], row_bytes: int, hidden_size: int, device, dtype) -> Link:
    cases = [(rows, skew) for skews, sizes in (((0.0, SKEW_TO_FIT), ROWS_SENT), ((SKEW_KEPT_APART,), ROWS_KEPT_APART))
             for skew in skews for rows in sizes]
    sent = [_rows_to(partners, rows, skew) for rows, skew in cases]
    times_s = _slowest_s([_exchange(rows_R, hidden_size, device, dtype) for rows_R in sent], device)
    received_bytes = np.array([_received(rows_R, device) for rows_R in sent]) * 2.0 * row_bytes
    fit = slice(0, 2 * len(ROWS_SENT))
    terms = np.stack([np.ones_like(times_s), received_bytes], axis=1)
    coefficients, _ = nnls(terms[fit] / times_s[fit, None], np.ones_like(times_s[fit]))
    errors = terms @ coefficients / times_s - 1
    return Link(float(1 / max(coefficients[1], 1e-30)), errors[fit], errors[len(errors[fit]):])


def _rows_to(partners: Sequence[int], rows: int, skew: float) -> list[int]:
    """[R] rows that this rank sends: to its partners only, ever more up to the last one."""
    place = np.arange(len(partners)) - (len(partners) - 1) / 2
    shares = 1 + skew * 2 * place / max(len(partners), 1)
    counts = np.floor(rows * shares / shares.sum()).astype(int)
    rows_R = [0] * dist.get_world_size()
    for rank, count in zip(partners, counts.tolist(), strict=True):
        rows_R[rank] = count
    return rows_R


def _exchange(rows_R: list[int], hidden_size: int, device, dtype):
    """A call of it sends the rows and gets them back."""
    received_R = _transposed(rows_R, device)
    there = torch.ones(sum(rows_R), hidden_size, device=device, dtype=dtype)
    here = torch.empty(sum(received_R), hidden_size, device=device, dtype=dtype)

    def run():
        dist.all_to_all_single(here, there, received_R, rows_R)
        dist.all_to_all_single(there, here, rows_R, received_R)
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    return run


def _transposed(rows_R: list[int], device) -> list[int]:
    """[R] rows that this rank receives."""
    sent, received = (torch.tensor(rows_R, device=device) for _ in range(2))
    dist.all_to_all_single(received, sent)
    return received.tolist()


def _received(rows_R: list[int], device) -> int:
    """Rows from other ranks on the rank that receives most."""
    received_R = _transposed(rows_R, device)
    received_R[dist.get_rank()] = 0
    most = torch.tensor(sum(received_R), device=device)
    dist.all_reduce(most, dist.ReduceOp.MAX)
    return int(most)


def _slowest_s(runs: Sequence, device) -> np.ndarray:
    """Of each run the least time, over rounds, of its slowest rank."""
    times = torch.zeros(ROUNDS + 1, len(runs), dtype=torch.float64, device=device)  # the first round warms up
    for times_of_round in times:
        for i, run in enumerate(runs):
            dist.barrier()
            start = time.perf_counter()
            run()
            times_of_round[i] = time.perf_counter() - start
    dist.all_reduce(times, dist.ReduceOp.MAX)
    return times[1:].min(dim=0).values.cpu().numpy()
