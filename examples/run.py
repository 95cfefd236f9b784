"""Start a training run that an .args file describes: print the torchrun line and become it.

    python examples/run.py examples/tiny_cpu/hmoe_topp.args --train-data-path ... --tokenizer-model ...

An .args file holds one flag and its value a line, `#` comments, and `include OTHER.args`, relative to the file. Flags
on the command line come last, so they win. Environment:

    NPROC_PER_NODE  ranks on this node; default: its GPUs, without one as many as --expert-model-parallel-size
    NNODES          default 1. With more, on every node: NODE_RANK, from 0, and MASTER_ADDR, the address of node 0
    MASTER_PORT     of node 0; default 29500
"""

import argparse
import os
import shlex
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from hmoe_megatron.flag_files import read_args

PRETRAIN = Path(__file__).parents[1] / "pretrain_hmoe.py"


def ranks_here(flags: list[str]) -> int:
    """Ranks to start on this node when the user does not say."""
    import torch

    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--expert-model-parallel-size", type=int, default=1)
    return torch.cuda.device_count() or parser.parse_known_args(flags)[0].expert_model_parallel_size


def torchrun_command(flags: list[str], environment) -> list[str]:
    """The torchrun command of this node. ValueError where several nodes are asked for and one can't find the first."""
    nodes = environment.get("NNODES", "1")
    command = [sys.executable, "-m", "torch.distributed.run"]  # torchrun, also where it is not on PATH
    if nodes == "1":
        command += ["--standalone"]
    else:
        missing = " and ".join(name for name in ("NODE_RANK", "MASTER_ADDR") if not environment.get(name))
        if missing:
            raise ValueError(f"NNODES={nodes}: {missing} missing: number of this node from 0, address of node 0")
        command += ["--nnodes", nodes, "--node-rank", environment["NODE_RANK"]]
        command += ["--master-addr", environment["MASTER_ADDR"]]
        command += ["--master-port", environment.get("MASTER_PORT", "29500")]
    command += ["--nproc-per-node", environment.get("NPROC_PER_NODE") or str(ranks_here(flags))]
    return [*command, str(PRETRAIN), *flags]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry-run", action="store_true", help="print the line and stop")
    parser.add_argument("args_file", type=Path, metavar="FILE.args")
    parser.add_argument("flags", nargs=argparse.REMAINDER, help="more flags of pretrain_hmoe.py")
    given = parser.parse_args()
    try:
        command = torchrun_command(read_args(given.args_file) + given.flags, os.environ)
    except (ValueError, OSError) as error:
        print(f"run.py: error: {error}", file=sys.stderr)
        return 2
    print(shlex.join(command), flush=True)
    # Megatron asks for it with tensor parallelism on GPUs older than Blackwell; one's own setting wins.
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    return 0 if given.dry_run else os.execv(command[0], command)


if __name__ == "__main__":
    sys.exit(main())
