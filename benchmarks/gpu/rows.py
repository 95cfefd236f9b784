"""What an item prints: a JSON line a row, as soon as it is there. And how it takes times."""

import json
import statistics
import time

import torch

TINY_CALLS = 3


def emit(**row) -> None:
    """One row of the item's table."""
    print(json.dumps(row), flush=True)


def device() -> torch.device:
    """The GPU, or the CPU of a test."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def median_ms(run, repeat_ms: int = 30) -> float:
    """Median milliseconds of a call, the L2 cache empty before each."""
    if torch.cuda.is_available():
        from triton.testing import do_bench

        return do_bench(run, warmup=8, rep=repeat_ms, return_mode="median")
    times = []
    for _ in range(TINY_CALLS):
        start = time.perf_counter()
        run()
        times.append((time.perf_counter() - start) * 1e3)
    return statistics.median(times)


def peak_bytes(run) -> int:
    """Most bytes of the device that a call needs above what is there."""
    if not torch.cuda.is_available():
        run()
        return 0
    run()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before
