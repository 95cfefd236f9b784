"""Start a training run on this node and start it again, from its last checkpoint, when it fails.

python tools/launch.py examples/tiny_cpu/hmoe_topp.args --save DIR --load DIR ...
python tools/launch.py --nproc-per-node 8 pretrain_hmoe.py --save DIR --load DIR ...

Takes the place of torchrun. On several nodes start it on each, with NNODES, NODE_RANK (from 0), MASTER_ADDR (of node 0)
and MASTER_PORT (default 29500) in the environment. Exit code: 0 done; 1 given up; 2 settings refused and 3 checkpoint
refused, where a restart does not help; 128 + number of the signal that stopped it (SIGTERM, SIGINT or SIGHUP, handed
on to all ranks; a second one kills them).
"""

import argparse
import importlib.util
import logging
import os
import shlex
import sys
from pathlib import Path

if not __package__:  # run as a file
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from hmoe_megatron.flag_files import read_args
from hmoe_megatron.launch.nodes import nodes_from, ranks_here, tell_gloo
from hmoe_megatron.launch.policy import Restarts, checkpoint_directory
from hmoe_megatron.launch.process import handle_signals, leave, set_environment


def run(given: argparse.Namespace) -> int:
    """Raises ValueError or OSError for what can't be started."""
    wanted = {"--nproc-per-node": given.nproc_per_node or 1, "--restarts": given.restarts + 1}
    wanted |= {"--backoff": given.backoff + 1, "--max-backoff": given.max_backoff + 1}
    wanted |= {"--join-timeout": given.join_timeout, "--stop-timeout": given.stop_timeout}
    if wrong := [flag for flag, value in wanted.items() if not 0 < value < float("inf")]:
        raise ValueError(f"{wrong[0]}: give a number of at least 0, and of ranks and time-outs more than 0")
    nodes = nodes_from(os.environ)
    if given.what.endswith(".args"):
        script = Path(importlib.util.find_spec("pretrain_hmoe").origin)  # beside tools/, or in site-packages
        flags = read_args(given.what) + given.flags
    else:
        script, flags = Path(given.what), given.flags
    if not script.is_file():
        raise ValueError(f"{script}: no such file; give pretrain_hmoe.py or a FILE.args before its flags")
    checkpoints = checkpoint_directory(flags)
    ranks = given.nproc_per_node or int(os.environ.get("NPROC_PER_NODE") or ranks_here(flags))
    command = [sys.executable, str(script), *flags]
    where = f"{nodes.address}:{nodes.port}" if nodes.count > 1 else "itself"
    print(
        f"launch: node {nodes.rank} of {nodes.count}, meets at {where}, {ranks} ranks: {shlex.join(command)}",
        flush=True,
    )
    if given.dry_run:
        return 0
    handle_signals(leave)
    set_environment(ranks)
    tell_gloo(nodes.count, nodes.address)
    if quiet := "TORCH_CPP_LOG_LEVEL" not in os.environ:  # torch reads it once; a node that leaves is no warning
        os.environ["TORCH_CPP_LOG_LEVEL"] = "ERROR"
    from hmoe_megatron.launch.supervise import supervise

    if quiet:
        del os.environ["TORCH_CPP_LOG_LEVEL"]
        logging.disable()
    restarts = Restarts(given.restarts, given.backoff, given.max_backoff, checkpoints)
    return supervise(nodes, command, ranks, restarts, given.join_timeout, given.stop_timeout)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument(
        "--nproc-per-node",
        metavar="N",
        type=int,
        help="ranks on this node; default: NPROC_PER_NODE, else its GPUs, without one --expert-model-parallel-size",
    )
    parser.add_argument(
        "--restarts",
        metavar="N",
        type=int,
        default=10,
        help="failures in a row, that is without a "
        "new checkpoint between them, after which it starts again; default: 10",
    )
    parser.add_argument(
        "--backoff",
        metavar="S",
        type=float,
        default=1.0,
        help="seconds before the first restart, doubled for each more in a row; default: 1",
    )
    parser.add_argument("--max-backoff", metavar="S", type=float, default=300.0, help="at most; default: 300")
    parser.add_argument(
        "--join-timeout",
        metavar="S",
        type=float,
        default=600.0,
        help="seconds in which the launchers "
        "of all nodes must find each other, also again after one died; default: 600",
    )
    parser.add_argument(
        "--stop-timeout",
        metavar="S",
        type=float,
        default=600.0,
        help="seconds that ranks get to save and end after a signal; default: 600",
    )
    parser.add_argument("--dry-run", action="store_true", help="print what would be started and stop")
    parser.add_argument("what", metavar="pretrain_hmoe.py|FILE.args")
    parser.add_argument("flags", nargs=argparse.REMAINDER, help="of pretrain_hmoe.py")
    try:
        return run(parser.parse_args(argv))
    except (ValueError, OSError) as error:
        print(f"launch.py: error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
