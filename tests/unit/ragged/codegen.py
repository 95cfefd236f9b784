"""Compiles the kernels for a GPU that is not there: the launches of the host code, without a driver.

    python -m tests.unit.ragged.codegen CAPABILITY CLASS [--hidden 2048] [--widths 768,1408,2048]

prints a JSON line a kernel: registers, spilled bytes, shared memory, instructions. CLASS: of tiles.TILES.
"""

import argparse
import json
import os
import re
import subprocess
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver, jit

from hmoe_megatron.moe.compute.ragged import launches
from hmoe_megatron.moe.compute.ragged.schedule import Layer
from hmoe_megatron.moe.compute.ragged.tiles import TILES

ROWS = 100  # of a piece: kernels do not depend on it
BINARIES = Path(triton.__file__).parent / "backends/nvidia/bin"
INSTRUCTIONS = {
    "wgmma": r"wgmma\.mma_async",
    "mma": r"\bmma\.sync",
    "tcgen05": r"tcgen05\.mma",
    "async copies": r"cp\.async\.c[ga]\.shared",
    "16-byte stores": r"st\.global\S*v4",
    "prefetches": r"prefetch\.global",
}


class NoDevice:
    """As much of a driver as compiling needs."""

    def __init__(self, capability):
        self.capability = capability

    def get_current_target(self):
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device=None):
        return 0


def compiled(capability: int, tile_class: str, hidden: int, widths) -> list[dict]:
    """A row for each kernel of a forward and backward pass, gradients written and added."""
    driver.set_active(NoDevice(capability))
    found = {}

    def launch(kernel, grid):
        def compile_only(*args, **how):
            made = kernel.run(*args, grid=grid, warmup=True, **how)
            if made.hash not in found:
                found[made.hash] = {"kernel": kernel.fn.__name__, **_shown(how), **_facts(made, capability)}

        return compile_only

    jit.KernelInterface.__getitem__ = launch
    _launch_all(tile_class, hidden, widths)
    return list(found.values())


def _launch_all(tile_class, hidden, widths):
    fp32 = tile_class == "fp32"
    total, elements = sum(widths), ROWS * sum(widths)

    def new(*shape, dtype=torch.float32 if fp32 else torch.bfloat16):
        return torch.empty(shape, dtype=dtype)

    layer = Layer(widths, hidden, TILES[tile_class], torch.device("cpu"))
    batch = layer.batch(torch.tensor([ROWS] * len(widths)), ROWS * len(widths), skip_empty=False)
    x, probs = new(ROWS * len(widths), hidden), torch.empty(ROWS * len(widths))
    fc1, fc2, gate_up, h = new(2 * total, hidden), new(total, hidden), new(2 * elements), new(elements)
    for kept in (gate_up, None):
        launches.run_up(layer, batch, x, probs, fc1, kept, h)
    launches.run_down(layer, batch, h, fc2, x)
    launches.run_hidden_grad(layer, batch, x, fc2, h)
    for again in (h, None):
        launches.run_activation_grad(layer, batch, h, probs, gate_up, gate_up, again, probs)
    launches.run_input_grad(layer, batch, gate_up, fc1, x)
    for accumulate, dtype in ((False, x.dtype), (True, torch.float32)):
        launches.run_fc1_grad(layer, batch, gate_up, x, new(2 * total, hidden, dtype=dtype), accumulate)
        launches.run_fc2_grad(layer, batch, h, x, new(total, hidden, dtype=dtype), accumulate)


def _shown(how) -> dict:
    names = ("BM", "BN", "BK", "TIMES", "ACCUMULATE", "FLAT", "WRITE_GU", "WRITE_HIDDEN", "num_warps", "num_stages")
    return {name: how[name] for name in names if name in how}


def _facts(made, capability) -> dict:
    ptx = made.asm["ptx"]
    target = re.search(r"\.target (\w+)", ptx)[1]
    assembler = BINARIES / ("ptxas-blackwell" if capability >= 100 else "ptxas")
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        command = [assembler, "-v", f"--gpu-name={target}", file.name, "-o", os.devnull]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    return {
        "target": target,
        "registers": int(re.search(r"Used (\d+) registers", said)[1]),
        "spilled bytes": int(re.search(r"(\d+) bytes spill stores", said)[1]),
        "shared bytes": made.metadata.shared,
        "serialized": "erialized" in said,
        **{name: len(re.findall(form, ptx)) for name, form in INSTRUCTIONS.items()},
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("capability", type=int)
    parser.add_argument("tile_class", choices=TILES)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--widths", type=lambda text: tuple(map(int, text.split(","))), default=(768, 1408, 2048))
    args = parser.parse_args()
    for row in compiled(args.capability, args.tile_class, args.hidden, args.widths):
        print(json.dumps(row), flush=True)
