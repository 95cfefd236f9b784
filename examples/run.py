"""Start a training run that an .args file describes: print the torchrun line and become it.

    python examples/run.py examples/tiny_cpu/hmoe_topp.args --train-data-path ... --tokenizer-model ...

An .args file holds one flag and its value a line, `#` comments, and `include OTHER.args`, relative to the file. Flags
on the command line come last, so they win. Environment:

    NPROC_PER_NODE  ranks on this node; default: its GPUs, without one as many as --expert-model-parallel-size
    NNODES          default 1. With more, on every node: NODE_RANK, from 0, and MASTER_ADDR, the address of node 0
    MASTER_PORT     of node 0; default 29500
    GLOO_SOCKET_IFNAME  with several nodes: gloo's network interface; default: the one that leads to MASTER_ADDR

`tools/launch.py` takes the same words and environment, and starts a run again that failed.
"""

import argparse
import os
import shlex
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from hmoe_megatron.flag_files import last_value, read_args
from hmoe_megatron.launch.nodes import nodes_from, ranks_here, tell_gloo

PRETRAIN = Path(__file__).parents[1] / "pretrain_hmoe.py"


def torchrun_command(flags: list[str], environment) -> list[str]:
    """The torchrun command of this node; without torchrun where a number of ranks is only checked. ValueError where
    several nodes are asked for and one can't find the first."""
    if "--hmoe-check-only" in flags and last_value(flags, "--world-size"):
        return [sys.executable, str(PRETRAIN), *flags]
    nodes = nodes_from(environment)
    command = [sys.executable, "-m", "torch.distributed.run"]  # torchrun, also where it is not on PATH
    if nodes.count == 1:
        command += ["--standalone"]
    else:  # not c10d, which numbers nodes by its own order and wants every host to resolve its own name
        command += ["--nnodes", str(nodes.count), "--node-rank", str(nodes.rank)]
        command += ["--master-addr", nodes.address, "--master-port", str(nodes.port)]
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
        nodes = nodes_from(os.environ)
    except (ValueError, OSError) as error:
        print(f"run.py: error: {error}", file=sys.stderr)
        return 2
    print(shlex.join(command), flush=True)
    if given.dry_run:
        return 0
    # Megatron asks for it with tensor parallelism on GPUs older than Blackwell; one's own setting wins.
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    tell_gloo(nodes.count, nodes.address)
    return os.execv(command[0], command)


if __name__ == "__main__":
    sys.exit(main())
