"""The triton backend on the device at hand against fp32: named cases, random ones, poisoned memory, twice bitwise.

    python -m benchmarks.gpu.correctness [--dtype DTYPE | --graph | --random COUNT --kind 0..7 | --sanitizer] [--tiny]

Inputs are drawn anew at every call. Random cases come in KINDS, which differ in the kernels that they need compiled: as
many processes at a time compile them as there are. --sanitizer: a few cases under compute-sanitizer.
"""

import argparse
import math
import os
import random
import shutil
import subprocess
import sys
import time

import torch

from benchmarks.gpu.rows import device, emit
from benchmarks.machine import ROOT
from hmoe_megatron.moe.compute.choice import first_line
from hmoe_megatron.moe.compute.ragged.experts import layer_of, ragged_experts, ragged_swiglu
from hmoe_megatron.moe.compute.ragged.self_test import BOUNDS, LARGEST, Case, drawn, errors, results

NAMES = ("bfloat16", "float16", "float32")
DTYPES = tuple(getattr(torch, name) for name in NAMES)
CASES = {
    "widest first, one without rows": Case(1024, (2208, 864, 1440), (700, 0, 130)),
    "widest last, added": Case(768, (864, 1056, 2208), (300, 0, 500), accumulate=True),
    "one row": Case(512, (256, 128), (0, 1)),
    "no rows": Case(512, (256, 128), (0, 0)),
    "no rows, added": Case(512, (256, 128), (0, 0), accumulate=True),
    "64 pieces": Case(512, tuple(128 + 8 * (5 * e % 31) for e in range(64)), tuple(3 * e % 97 for e in range(64))),
    "one piece": Case(1024, (1408,), (515,)),
    "all rows on the narrowest": Case(512, (640, 128, 384), (0, 1030, 0)),
    "widths of 8 times odd numbers": Case(528, (8, 888, 264, 1016), (5, 160, 330, 20)),
    "few rows": Case(2048, (768, 1408, 2048), (17, 130, 64), accumulate=True),
    "many rows": Case(1024, (384, 640), (4096, 2049)),
}
KINDS = 8
TINY = {
    "widest first, one without rows": Case(32, (40, 16, 24), (18, 0, 1)),
    "widest last, added": Case(32, (16, 24), (17, 3), accumulate=True),
}


def random_case(draw: random.Random, kind: int) -> Case:
    """Any number of pieces, rows skewed, some without; up to some 10^8 numbers a matrix. kind: three bits, of whether
    tiles divide the hidden size and the widths, and gradients are added."""
    pieces = draw.choice((1, 2, 3, 8, 17, 64))
    most_width = 512 if pieces > 8 else 2304
    unit = 256 if kind & 2 else 8
    widths = [unit * draw.randint(1, most_width // unit) for _ in range(pieces)]
    if unit == 8:
        widths[0] |= 8  # not a multiple of 16: no tile divides all of them
    most = draw.choice((4, 60, 300, 1500))
    rows = tuple(0 if draw.random() < 0.2 else int(most * draw.random() ** 2) for _ in range(pieces))
    hidden = 256 * draw.randint(1, 6) if kind & 1 else 16 * (2 * draw.randint(0, 47) + 1)
    return Case(hidden, tuple(widths), rows, bool(kind & 4))


def worst_of(cases: dict, dtype, seed: int, until: float = math.inf) -> dict:
    """Of the cases begun before ``until``, seconds since the epoch: {"cases": how many, "of": of how many, "failed":
    [...], "worst": {"y": norm of the error over that of the result, ...}, "different in a second run": [...]}."""
    failed, different, worst, done = [], [], {}, 0
    for number, (name, case) in enumerate(cases.items()):
        if time.time() > until:
            break
        done += 1
        try:
            found = errors(case, dtype, device(), ragged_experts, seed=seed + number)
            for what, (norm, largest) in found.items():
                worst[what] = max(worst.get(what, 0.0), norm)
                if not (norm < BOUNDS[dtype] and largest < LARGEST * BOUNDS[dtype]):
                    failed.append(f"{name}: {what} off by {norm:.1e} of its norm, {largest:.1e} of its largest: {case}")
            if not same_twice(case, dtype, seed + number):
                different.append(name)
        except Exception as error:
            failed.append(f"{name}: {first_line(error)}: {case}")
    return {"cases": done, "of": len(cases), "failed": failed, "worst": worst, "different in a second run": different}


def same_twice(case: Case, dtype, seed: int) -> bool:
    """Whether two runs give the same bits."""
    given, dy = drawn(case, device(), seed)
    given = [tensor.to(dtype) if tensor.dim() > 1 else tensor for tensor in given]
    first, second = (results(case, given, dy.to(dtype), ragged_experts) for _ in range(2))
    return all(map(torch.equal, first, second))


def in_a_graph(case: Case) -> dict:
    """Whether a CUDA graph of the experts' forward and backward pass, captured with other rows, gives the same."""
    if not torch.cuda.is_available():
        return {"skipped": "there is no CUDA"}
    (x, probs, fc1, fc2), dy = drawn(case, device())
    x, fc1, fc2, dy = (tensor.to(torch.bfloat16) for tensor in (x, fc1, fc2, dy))
    leaves = [tensor.requires_grad_() for tensor in (x, probs, fc1, fc2)]
    layer = layer_of(case.widths, case.hidden, x.dtype, x.device, sum(case.rows))
    most = sum(case.rows) * max(case.widths)
    captured_rows = torch.tensor(case.rows[::-1], dtype=torch.int32, device=x.device)

    def run():
        y = ragged_swiglu(*leaves, captured_rows, layer, most)
        return [y, *torch.autograd.grad(y, leaves, dy)]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed = run()
    captured_rows.copy_(torch.tensor(case.rows))
    graph.replay()
    differ = [
        name
        for name, a, b in zip(("y", "dx", "dp", "dW1", "dW2"), replayed, run(), strict=True)
        if not torch.equal(a, b)
    ]
    return {"failed": differ}


def sanitized(until: float) -> dict:
    """What compute-sanitizer's memcheck says of a few cases; needs the tool."""
    tool = shutil.which("compute-sanitizer", path=f"{os.environ.get('PATH', '')}:/usr/local/cuda/bin")
    if not tool:
        return {"skipped": "compute-sanitizer is not installed"}
    command = [
        tool,
        "--tool",
        "memcheck",
        "--error-exitcode",
        "9",
        sys.executable,
        "-m",
        "benchmarks.gpu.correctness",
        "--only",
        "few rows",
        "--only",
        "widest last, added",
    ]
    # Each tensor its own allocation, so that a read past one is seen.
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    left_s = max(1.0, until - time.time())
    try:
        done = subprocess.run(
            command,
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=None if math.isinf(left_s) else left_s,
        )
    except subprocess.TimeoutExpired:
        return {"skipped": f"not done after {left_s:.0f} s"}
    summary = [line for line in done.stdout.splitlines() if "ERROR SUMMARY" in line]
    return {
        "failed": [] if done.returncode == 0 else (done.stdout + done.stderr).splitlines()[-20:],
        "said": summary[-1].strip("= ") if summary else "no summary",
    }


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--random", type=int, default=0, help="random cases in bf16, and nothing else; default: none")
    parser.add_argument("--kind", type=int, choices=range(KINDS), default=0, help="of the random cases")
    parser.add_argument("--dtype", choices=NAMES, help="the named cases in this one, and nothing else")
    parser.add_argument("--graph", action="store_true", help="a CUDA graph, and nothing else")
    parser.add_argument("--only", action="append", help="of the named cases these, in bf16, and nothing else")
    parser.add_argument("--sanitizer", action="store_true", help="a few cases under compute-sanitizer, nothing else")
    parser.add_argument("--tiny", action="store_true", help="small cases, for a test on a CPU")
    parser.add_argument("--until", type=float, default=math.inf, help="begin no case after it, seconds since the epoch")
    given = parser.parse_args(argv)
    seed = int.from_bytes(os.urandom(4), "little")
    if given.sanitizer:
        emit(what="compute-sanitizer, memcheck", cases=2, **sanitized(given.until))
        return
    if given.random:
        draw = random.Random(seed)
        cases = {f"random {number}": random_case(draw, given.kind) for number in range(given.random)}
        emit(
            what=f"random cases, kind {given.kind}",
            dtype="bfloat16",
            seed=seed,
            **worst_of(cases, torch.bfloat16, seed, given.until),
        )
        return
    everything = not (given.dtype or given.graph or given.only)
    # bf16 is wrong in Triton's interpreter.
    dtypes = ["float32"] if given.tiny else [given.dtype] if given.dtype else NAMES if everything else NAMES[:1]
    cases = TINY if given.tiny else {name: CASES[name] for name in given.only or CASES}
    for dtype in [] if given.graph else dtypes:
        emit(what="named cases", dtype=dtype, seed=seed, **worst_of(cases, getattr(torch, dtype), seed, given.until))
    if everything or given.graph:
        emit(
            what="a CUDA graph, replayed with other rows",
            dtype="bfloat16",
            cases=1,
            **in_a_graph(CASES["widest first, one without rows"]),
        )


if __name__ == "__main__":
    main()
