"""Measure a hardware profile for the planner on the machine at hand.

python tools/profile_hardware.py --output profile.json
torchrun --nproc-per-node 2 tools/profile_hardware.py --output profile.json

Times the experts' own compute, forward and backward, over a grid of rows and widths, fits the cost model, and says how
far off it is on layers kept apart. Under torchrun it times the all-to-all too, inside a node and, with several nodes,
across. fp32 and one thread on a CPU, bf16 on a GPU (where it has never been run).
"""

import argparse
import contextlib
import os
import sys
import warnings
from pathlib import Path

if not __package__:  # run as a file
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from hmoe_megatron.files import check_output
from hmoe_megatron.launch.process import check_rank_environment

MAX_SIZE = 65_536
MAX_SECONDS = 3600
MAX_ELEMENTS = 2**31  # of weights and rows of all layers, which are there at the same time
EXAMPLES = 6
CPU_GRID = {"hidden_size": (128, 512), "rows": (4, 16, 64, 256, 1024), "widths": (32, 128, 512)}
GPU_GRID = {"hidden_size": (1024, 4096), "rows": (16, 64, 256, 1024, 4096), "widths": (256, 1024, 4096)}
# rate: what it is, its unit, and how many of the profile's make one
RATES = {
    "flops_per_s": ("products", "GFLOP/s", 1e-9),
    "launch_s": ("fixed time of a piece", "us", 1e6),
    "activation_bytes_per_s": ("activations between products", "GB/s", 1e-9),
    "memory_bytes_per_s": ("reading weights", "GB/s", 1e-9),
    "row_tile": ("row tile", "rows", 1),
    "intra_node_bytes_per_s": ("received inside a node", "GB/s", 1e-9),
    "inter_node_bytes_per_s": ("received across nodes", "GB/s", 1e-9),
}


def check_flags(args: argparse.Namespace) -> None:
    """Raises ValueError for a flag with which nothing could be measured."""
    for name in CPU_GRID:
        values = getattr(args, name) or ()
        if wrong := [value for value in values if not 1 <= value <= MAX_SIZE]:
            raise ValueError(f"--{name.replace('_', '-')} {wrong[0]}: give whole numbers from 1 to {MAX_SIZE}")
        if name != "hidden_size" and len({*values}) == 1:
            raise ValueError(f"--{name} {values[0]}: give two or more that differ; layers between them are kept apart")
    if not 0 < args.seconds <= MAX_SECONDS:
        raise ValueError(f"--seconds {args.seconds:g}: give a number over 0, at most {MAX_SECONDS}")


def run(args: argparse.Namespace, rank: int, ranks: int) -> None:
    """Measures on all ranks, writes and prints on rank 0. Raises ValueError for a wrong flag."""
    check_flags(args)
    if rank == 0:  # other nodes may not have the folder
        check_output(args.output, "--output")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what Megatron misses when it is imported is the doctor's affair
        from hmoe_megatron import machine
        from hmoe_megatron.tools.calibration.layers import layers_kept_apart, layers_to_fit
        from hmoe_megatron.tools.calibration.machine import measure
    default = GPU_GRID if machine.has_gpu() else CPU_GRID
    grid = [getattr(args, name) or default[name] for name in default]
    fit, apart = layers_to_fit(*grid), layers_kept_apart(*grid)
    elements = sum(3 * layer.hidden_size * (sum(layer.widths) + sum(layer.rows)) for layer in fit + apart)
    if elements > MAX_ELEMENTS:
        raise ValueError(
            f"--hidden-size, --rows, --widths: weights and rows of {len(fit + apart)} layers are "
            f"{elements:.1e} numbers, over {MAX_ELEMENTS:.1e}; give fewer or smaller ones"
        )
    if rank == 0:
        print(
            f"{len(fit)} layers to fit, {len(apart)} kept apart, {ranks} rank(s): about {args.seconds:g} s", flush=True
        )
    with job(ranks):
        measured = measure(fit, apart, args.seconds)
    if rank == 0:
        measured.profile.save(args.output)
        print("\n".join(table(measured, apart)) + f"\n\n{args.output}: written")


@contextlib.contextmanager
def job(ranks: int):
    """torch.distributed, where there is more than one rank."""
    import torch

    from hmoe_megatron import machine

    if machine.has_gpu():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    if ranks > 1:
        torch.distributed.init_process_group("nccl" if machine.has_gpu() else "gloo")
    try:
        yield
    finally:
        if ranks > 1:
            torch.distributed.destroy_process_group()


def table(measured, apart) -> list[str]:
    """Lines of at most 100 columns: rates, errors, and examples from the most under- to the most over-predicted."""
    import numpy as np

    lines = ["", measured.profile.name[:100]]
    for rate, (what, unit, scale) in RATES.items():
        value = getattr(measured.profile, rate)
        lines.append(f"  {what:28}" + ("not measured" if value is None else f"{value * scale:12,.1f} {unit}"))
    lines += ["", f"  {'predicted over measured - 1':32}{'cases':>6}{'median':>9}{'90 %':>9}{'worst':>9}"]
    for what, errors in measured.errors.items():
        shares = "".join(f"{np.quantile(np.abs(errors), share):9.1%}" for share in (0.5, 0.9, 1.0))
        lines.append(f"  {what:32}{len(errors):6}{shares}")
    lines += ["", f"  {'H':>5}  {'rows of experts':27}{'widths of experts':27}     measured     predicted    error"]
    errors = measured.errors["layers kept apart"]
    order = np.argsort(errors)[np.linspace(0, len(errors) - 1, min(EXAMPLES, len(errors))).astype(int)]
    for i in order.tolist():
        rows, widths = (" ".join(map(str, values)) for values in (apart[i].rows, apart[i].widths))
        ms = measured.times_s[i] * 1e3
        lines.append(
            f"  {apart[i].hidden_size:5}  {rows:27}{widths:27}{ms:10,.2f} ms"
            f"{ms * (1 + errors[i]):11,.2f} ms{errors[i]:+9.1%}"
        )
    return lines


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--output", metavar="FILE", type=Path, required=True, help="the profile, JSON; replaced if it is there"
    )
    sizes = {"metavar": "N", "type": int, "nargs": "+"}
    default = {
        name: " on a CPU, ".join(" ".join(map(str, grid[name])) for grid in (CPU_GRID, GPU_GRID)) + " on a GPU"
        for name in CPU_GRID
    }
    parser.add_argument(
        "--hidden-size", **sizes, help="one or more, best around that of the model; default: " + default["hidden_size"]
    )
    parser.add_argument("--rows", **sizes, help="of an expert, two or more; default: " + default["rows"])
    parser.add_argument("--widths", **sizes, help="of an expert, two or more; default: " + default["widths"])
    parser.add_argument("--seconds", metavar="S", type=float, default=20.0, help="to time the compute; default: 20")
    args = parser.parse_args(argv)
    from hmoe_megatron import machine

    machine.prepare_environment()
    rank = 0
    try:
        check_rank_environment()
        rank, ranks = (int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1)))
        run(args, rank, ranks)
    except (ValueError, OSError) as error:
        if rank == 0:
            print(f"profile_hardware: {error}", file=sys.stderr)
        return 2 if isinstance(error, ValueError) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
