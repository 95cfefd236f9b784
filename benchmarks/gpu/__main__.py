"""make gpu: correctness, times, training steps and runs, and a hardware profile, on the machine at hand.

    python -m benchmarks.gpu [--seconds 300] [--only ITEM] [--output benchmarks]

For a machine with a GPU, torch and Triton, where megatron-core may lie in a folder of PYTHONPATH; installs nothing.
What is not there is named and skipped. Items come in the order of their value, each with its own limit; rows are
printed and written as they come, so that a run that is cut off still says something. Ends with gpu.json, gpu.md,
gpu_profile.json and gpu_logs.tar.gz; exit code 1 where something is wrong. COMMIT in the environment names the
commit where the code lies without git.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.gpu import report
from benchmarks.gpu.items import ITEMS, Session, do
from benchmarks.gpu.table import Table
from benchmarks.machine import ROOT

MACHINE = """
import json, os, platform, torch, triton
from benchmarks.machine import stamp
from hmoe_megatron.machine import optional
kernels = optional.kernels()
gpu = torch.cuda.is_available()
card = f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}" if gpu else "no GPU"
engine = kernels.engine or kernels.no_engine
versions = f"Triton {triton.__version__}, CUDA {torch.version.cuda}, Transformer Engine {engine}"
print(json.dumps({"gpus": torch.cuda.device_count() if gpu else 0, "card": card, "engine": bool(kernels.engine),
                  "capability": torch.cuda.get_device_capability() if gpu else [0, 0],
                  "memory_bytes": torch.cuda.get_device_properties(0).total_memory if gpu else 0,
                  "stamp": f"{card}; {versions}; {stamp('torch')}"}))
"""


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=300, help="for everything; default: 300")
    parser.add_argument("--only", action="append", choices=ITEMS, help="of the items these")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks", help="folder of gpu.json and gpu.md")
    parser.add_argument("--tiny", action="store_true", help="small shapes on a CPU, for the tests")
    given = parser.parse_args(argv)
    began, table = time.monotonic(), Table(given.output)
    environment = {"PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))}
    os.environ.update(environment | ({"TRITON_INTERPRET": "1"} if given.tiny else {}))
    command = [sys.executable, "-W", "ignore", "-c", MACHINE]
    try:
        asked = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, errors="replace", timeout=120)
    except subprocess.TimeoutExpired:
        print("make gpu: the machine did not say within 120 s what it is", file=sys.stderr)
        return 1
    if asked.returncode:
        said = asked.stderr.strip().splitlines() or [f"exit code {asked.returncode}"]
        print(f"make gpu: {said[-1]}", file=sys.stderr)
        return 1
    table.machine = json.loads(asked.stdout.splitlines()[-1])
    print(table.machine["stamp"], flush=True)
    if not (table.machine["gpus"] or given.tiny):
        print("make gpu: torch finds no GPU on this machine (make doctor says why)", file=sys.stderr)
        return 2
    given.output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="make-gpu-") as logs:
        left = given.seconds - (time.monotonic() - began)
        do(Session(table, Path(logs), given.tiny), given.only or list(ITEMS), left)
    print(report.page(table.machine, table.rows, table.notes))
    wrong = table.wrong()
    print(
        f"{given.output / 'gpu.md'}: written in {time.monotonic() - began:.0f} s; "
        f"{'wrong: ' + ', '.join(wrong) if wrong else 'nothing is wrong'}"
    )
    return int(bool(wrong))


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    os._exit(code)  # a side that hangs must not keep the command
