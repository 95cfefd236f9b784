"""Time and peak memory of `convert_checkpoint.py to-hf`: the 0.4B model of examples/ and others of its width.

python -m benchmarks.convert. Saves each after one step of training, exports it in a process of its own, and writes
benchmarks/convert.md.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from benchmarks.machine import ROOT, stamp
from hmoe_megatron.files import atomic_write
from hmoe_megatron.flag_files import read_args

OUTPUT = ROOT / "benchmarks" / "convert.md"
ONE_STEP = (
    "--train-iters 1 --save-interval 1 --micro-batch-size 1 --global-batch-size 1 --seq-length 64 --mock-data "
    "--tokenizer-type NullTokenizer --vocab-size 32000 --num-workers 0 --no-save-optim --eval-iters 0 "
    "--eval-interval 1000 --lr-decay-iters 10 --lr-warmup-iters 0"
).split()
TINY = "--num-layers 1 --hidden-size 64 --num-attention-heads 4 --hmoe-total-width 1024".split()
KINDS = {"native": (), "native, bf16": ("--dtype", "bf16"), "padded Mixtral": ("--padded", "mixtral")}


class Measured(NamedTuple):
    """wall_s, peak_bytes: of the process; file_bytes: of the weights it wrote."""

    wall_s: float
    peak_bytes: int
    file_bytes: int


def run(words: list) -> tuple[float, int]:
    """(seconds, peak of resident memory in bytes) of a process. SystemExit if it fails."""
    with tempfile.TemporaryFile("w+") as said:
        started_s = time.monotonic()
        process = subprocess.Popen([*map(str, words)], cwd=ROOT, stdout=said, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)
        wall_s = time.monotonic() - started_s
        if status:
            said.seek(0)
            sys.exit(f"convert: {' '.join(map(str, words[:4]))} failed\n{said.read()[-3000:]}")
    return wall_s, usage.ru_maxrss * 1024


def save(run_dir: Path, flags: list[str]) -> None:
    """A checkpoint after one step on one rank."""
    model = [word for word in read_args(ROOT / "examples/hmoe_0.4b/hmoe_topk.args") if word != "--bf16"]
    run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node",
            1,
            "pretrain_hmoe.py",
            *model,
            *ONE_STEP,
            "--save",
            run_dir,
            "--expert-model-parallel-size",
            1,
            *flags,
        ]
    )


def export(run_dir: Path, output: Path, flags: tuple[str, ...]) -> Measured:
    wall_s, peak = run(
        [
            sys.executable,
            "tools/convert_checkpoint.py",
            "to-hf",
            "--load",
            run_dir,
            "--output",
            output,
            "--no-logits",
            *flags,
        ]
    )
    size = sum(path.stat().st_size for path in output.glob("*.safetensors"))
    return Measured(wall_s, peak, size)


def measure(layers: list[int], folder: Path) -> tuple[int, dict[tuple[int, str], Measured], int]:
    """(peak of a model of next to nothing, {(layers, kind): measured}, bytes of one layer)."""
    found = {}
    save(folder / "run", TINY)
    framework = export(folder / "run", folder / "out", ()).peak_bytes
    for number in layers:
        for name in ("run", "out"):
            shutil.rmtree(folder / name)
        save(folder / "run", ["--num-layers", str(number)])
        for kind, flags in KINDS.items():
            shutil.rmtree(folder / "out", ignore_errors=True)
            found[number, kind] = export(folder / "run", folder / "out", flags)
            print(number, kind, found[number, kind], flush=True)
    few, many = (found[number, "native"].file_bytes for number in (layers[0], layers[-1]))
    return framework, found, (many - few) // (layers[-1] - layers[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", default="4,12,24", help="of each model; 12 is the 0.4B one (default: 4,12,24)")
    given = parser.parse_args()
    if not re.fullmatch(r"\d+(,\d+)+", given.layers):
        parser.error("--layers: at least two numbers, as in 4,12,24")
    layers = sorted(map(int, given.layers.split(",")))
    with tempfile.TemporaryDirectory(prefix="convert-") as folder:
        framework, found, layer = measure(layers, Path(folder))
    rows = "\n".join(
        f"| {number} | {kind} | {of.file_bytes / 2**30:.2f} | {of.wall_s:.1f} | {of.peak_bytes / 2**30:.2f} | "
        f"{(of.peak_bytes - framework) / layer:.2f} |"
        for (number, kind), of in found.items()
    )
    text = f"""# From a checkpoint to a Hugging Face directory

`python -m benchmarks.convert --layers {given.layers}` on {stamp("torch", "transformers", "safetensors")}.

`to-hf --no-logits` of the model of `examples/hmoe_0.4b/hmoe_topk.args` (12 layers) and of the same with fewer and more
layers, fp32 checkpoints of one rank. SHA-256 of the checkpoint's files, the copy read back from the disk and compared,
and SHA-256 of every tensor are in the time. A process that exports next to nothing peaks at
{framework / 2**30:.2f} GiB; the last column is what lies above that, in layers of {layer / 2**20:.0f} MiB (fp32).

| layers | kind | weights written, GiB | s | peak, GiB | peak above, layers |
|---|---|---|---|---|---|
{rows}
"""
    print(text)
    atomic_write(OUTPUT, text.encode())


if __name__ == "__main__":
    main()
