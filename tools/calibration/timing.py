"""The least time of each of several runs, taken in turns: whatever else the machine does can only add."""

import time
from collections.abc import Callable, Sequence

import numpy as np
import torch

LEAST_ROUNDS = 3
TURN_S = 0.01
FLUSH_BYTES = 256 << 20  # more than the L2 cache of any GPU: a training step does not find its weights there


def timer(device: torch.device) -> Callable[[Callable[[], None]], float]:
    """Seconds of one call: of this thread on a CPU, which other processes do not lengthen; of the stream on a GPU."""
    if device.type == "cpu":
        return _thread_s
    flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=device)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def stream_s(run):
        flush.zero_()
        start.record()
        run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1000

    return stream_s


def _thread_s(run) -> float:
    start = time.thread_time()  # backward runs in this thread too
    run()
    return time.thread_time() - start


def least_times(runs: Sequence[Callable[[], None]], seconds: float, seconds_of: Callable) -> np.ndarray:
    """The least of seconds_of(run) for each run: one warm-up, then rounds of all runs until `seconds` have passed.

    In a round a run has a turn of TURN_S, or one call: a short one is the more easily disturbed.
    """
    least = [np.inf] * len(runs)
    for run in runs:
        seconds_of(run)
    rounds, until = 0, time.monotonic() + seconds
    while rounds < LEAST_ROUNDS or time.monotonic() < until:
        for i, run in enumerate(runs):
            turn_ends = time.monotonic() + TURN_S
            least[i] = min(least[i], seconds_of(run))
            while time.monotonic() < turn_ends:
                least[i] = min(least[i], seconds_of(run))
        rounds += 1
    return np.array(least)
