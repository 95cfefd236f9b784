"""pretrain_hmoe.py on one core for each rank: torchrun ... benchmarks/pinned.py FLAGS"""

import os
import runpy
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

if __name__ == "__main__":
    os.environ["OMP_NUM_THREADS"] = "1"
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[int(os.environ["LOCAL_RANK"]) % len(cores)]})
    sys.path.insert(0, str(ROOT))
    sys.argv[0] = str(ROOT / "pretrain_hmoe.py")
    runpy.run_path(sys.argv[0], run_name="__main__")
