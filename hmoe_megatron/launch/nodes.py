"""Which nodes a run has and which of them this is, from the environment; what gloo needs to know of the network."""

import argparse
import glob
import itertools
import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass

DEFAULT_PORT = 29500


@dataclass(frozen=True)
class Nodes:
    """count: of nodes; rank: this one's, from 0; address, port: where the others find node 0."""

    count: int = 1
    rank: int = 0
    address: str = "127.0.0.1"
    port: int = DEFAULT_PORT


def nodes_from(environment: Mapping[str, str]) -> Nodes:
    """From NNODES, NODE_RANK, MASTER_ADDR and MASTER_PORT. ValueError names what is missing or wrong."""
    count = _number(environment, "NNODES", 1, 1)
    port = _number(environment, "MASTER_PORT", DEFAULT_PORT, 1, 65535)
    if count == 1:
        return Nodes(port=port)
    missing = " and ".join(name for name in ("NODE_RANK", "MASTER_ADDR") if not environment.get(name))
    if missing:
        raise ValueError(f"NNODES={count}: {missing} missing: number of this node from 0, address of node 0")
    rank = _number(environment, "NODE_RANK", 0, 0, count - 1)
    return Nodes(count, rank, environment["MASTER_ADDR"], port)


def _number(environment: Mapping[str, str], name: str, default: int, least: int, most: int | None = None) -> int:
    text = environment.get(name) or str(default)
    if not text.isdecimal() or not least <= int(text) <= (most or int(text)):
        raise ValueError(f"{name}={text}: give a whole number from {least}" + (f" to {most}" if most else ""))
    return int(text)


def tell_gloo(nodes_count: int, address: str, environment=os.environ) -> None:
    """With several nodes set GLOO_SOCKET_IFNAME, where the user did not, to the interface that leads to node 0.

    By itself gloo takes the interface of the host's own name, which is often the loopback, or fails where the name
    does not resolve."""
    if nodes_count > 1 and "GLOO_SOCKET_IFNAME" not in environment and (name := interface_towards(address)):
        environment["GLOO_SOCKET_IFNAME"] = name


def interface_towards(address: str) -> str | None:
    """Name of this host's interface that leads to ``address``; None where it is not known."""
    import psutil

    own = own_address(address)
    return next((name for name, of in psutil.net_if_addrs().items() if own in [a.address for a in of]), None)


def own_address(towards: str) -> str | None:
    """This host's address as ``towards`` sees it; None without a route. Sends nothing."""
    try:
        family, kind, _, _, place = socket.getaddrinfo(towards, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(place)
            return probe.getsockname()[0]
    except OSError:
        return None


def reserved_port() -> socket.socket:
    """A socket bound to a free TCP port. While it is open no other process gets that port by chance, and torch's store,
    some seconds later when a rank has imported torch, can still listen there."""
    held = socket.socket()
    held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    held.bind(("", 0))
    return held


def gpus_here(environment: Mapping[str, str] = os.environ, devices: str = "/dev/nvidia[0-9]*") -> int:
    """GPUs of NVIDIA's that this process may use, by their device files: torch takes half a minute to count them."""
    held = len(glob.glob(devices))
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return held
    named = list(itertools.takewhile(lambda name: name not in ("", "-1"), map(str.strip, visible.split(","))))
    return min(held, len(named))


def ranks_here(flags: list[str]) -> int:
    """Ranks to start on this node when the user does not say: its GPUs, else --expert-model-parallel-size."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--expert-model-parallel-size", type=int, default=1)
    return gpus_here() or parser.parse_known_args(flags)[0].expert_model_parallel_size
