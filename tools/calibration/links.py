"""All-to-all with unequal splits, as the dispatcher uses it: rows go to their ranks and come back.

Letters: R ranks of the job, H hidden size; rows_RR[i, j] rows that rank i sends to rank j.
"""

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from scipy.optimize import nnls

TO_FIT = [(rows, skew) for skew in (0.0, 1.0) for rows in (64, 256, 1024, 4096)]  # sent by each rank
KEPT_APART = [(rows, 0.5) for rows in (128, 512, 2048)]
ROUNDS = 20


@dataclass(frozen=True)
class Link:
    """bytes_per_s: what the fullest rank receives from others, None where more rows took no more time.

    errors, errors_apart: predicted over measured time, minus 1, of each all-to-all TO_FIT and KEPT_APART.
    """

    bytes_per_s: float | None
    errors: np.ndarray
    errors_apart: np.ndarray


def measure_links(hidden_size: int, device: torch.device, dtype: torch.dtype) -> tuple[Link | None, Link | None]:
    """(inside a node, across): None where no two ranks of the job are so linked. All ranks call it.

    Raises ValueError where nodes have unequal numbers of ranks.
    """
    ranks = dist.get_world_size()
    local = int(os.environ.get("LOCAL_WORLD_SIZE", ranks))
    if ranks % local:
        raise ValueError(
            f"{ranks} ranks on nodes of {local}: start as many ranks on each node (torchrun --nproc-per-node)"
        )
    node_R = np.arange(ranks) // local  # torchrun numbers ranks node after node
    same_RR = node_R[:, None] == node_R
    return (
        _link(same_RR, hidden_size, device, dtype) if local > 1 else None,
        _link(~same_RR, hidden_size, device, dtype) if ranks > local else None,
    )


def _link(linked_RR: np.ndarray, hidden_size: int, device, dtype) -> Link:
    cases = [_rows_sent(linked_RR, rows, skew) for rows, skew in TO_FIT + KEPT_APART]
    times_s = _slowest_s([_exchange(rows_RR, hidden_size, device, dtype) for rows_RR in cases], device)
    rows_received = [(rows_RR - np.diag(np.diag(rows_RR))).sum(axis=0).max() for rows_RR in cases]
    there_and_back_bytes = 2.0 * hidden_size * dtype.itemsize * np.array(rows_received)
    terms = np.stack([np.ones_like(times_s), there_and_back_bytes], axis=1)
    fit = slice(len(TO_FIT))
    (fixed_s, s_per_byte), _ = nnls(terms[fit] / times_s[fit, None], np.ones_like(times_s[fit]))
    errors = terms @ (fixed_s, s_per_byte) / times_s - 1
    return Link(float(1 / s_per_byte) if s_per_byte else None, errors[fit], errors[len(TO_FIT) :])


def _rows_sent(linked_RR: np.ndarray, rows: int, skew: float) -> np.ndarray:
    """Each rank sends `rows` in all, over these links only; the last rank of all gets 1 + skew times the first's."""
    shares_RR = linked_RR * np.linspace(1, 1 + skew, len(linked_RR))
    return np.floor(rows * shares_RR / shares_RR.sum(axis=1, keepdims=True)).astype(int)


def _exchange(rows_RR: np.ndarray, hidden_size: int, device, dtype):
    """A call of it sends the rows and gets them back."""
    sent_R, received_R = rows_RR[dist.get_rank()].tolist(), rows_RR[:, dist.get_rank()].tolist()
    there = torch.ones(sum(sent_R), hidden_size, device=device, dtype=dtype)
    here = torch.empty(sum(received_R), hidden_size, device=device, dtype=dtype)

    def run():
        dist.all_to_all_single(here, there, received_R, sent_R)
        dist.all_to_all_single(there, here, sent_R, received_R)
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    return run


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
