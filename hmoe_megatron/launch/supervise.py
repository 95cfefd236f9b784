"""A run on this node from the first attempt to its end."""

import argparse
import contextlib
import os
import signal
import socket
import sys
import time
from pathlib import Path

from hmoe_megatron.launch.coordinator import Coordinator
from hmoe_megatron.launch.node import Node, Patience
from hmoe_megatron.launch.nodes import Nodes, tell_gloo
from hmoe_megatron.launch.policy import Restarts

TRACKER = "latest_checkpointed_iteration.txt"  # Megatron's
TICK_S = 0.05
LAST_WORDS_S = 5.0
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def supervise(nodes: Nodes, command: list[str], ranks: int, checkpoints: Path, restarts: Restarts,
              patience: Patience) -> int:  # fmt: skip
    """Run ``command`` as ``ranks`` ranks of this node until it is done or given up.

    Returns 0, 1 (given up), 2 or 3 (refused, as the ranks ended), 128 + the signal that stopped it. ValueError where
    node 0 can't listen at its port."""
    tell_gloo(nodes.count, nodes.address)
    received: list[int] = []
    for number in SIGNALS:
        if signal.getsignal(number) != signal.SIG_IGN:  # as nohup sets SIGHUP
            signal.signal(number, lambda number, frame: received.append(number))
    listener = None if nodes.rank else listen(nodes)
    if nodes.count == 1:  # any free port will do
        nodes = Nodes(port=listener.getsockname()[1])
    coordinator = listener and Coordinator(nodes, listener, restarts, lambda: saved_step(checkpoints), say,
                                           patience.join_s)  # fmt: skip
    node = Node(nodes, command, ranks, patience, say)
    with contextlib.closing(node):
        while node.code is None:
            while received:
                node.signal(received.pop(0))
            if coordinator:
                coordinator.tick()
            node.tick()
            time.sleep(TICK_S)
    if coordinator:
        hear_out(coordinator)
    return node.code


def hear_out(coordinator: Coordinator) -> None:
    """Until the other nodes have left: to leave before might take the last message from them."""
    until = time.monotonic() + LAST_WORDS_S
    while coordinator.members and time.monotonic() < until:
        coordinator.tick()
        time.sleep(TICK_S)


def listen(nodes: Nodes) -> socket.socket:
    """Node 0's listening socket: of one node on the loopback at any port, of several at all addresses."""
    place = ("", nodes.port) if nodes.count > 1 else ("127.0.0.1", 0)
    try:
        listener = socket.create_server(place, backlog=1024)
    except OSError as error:
        raise ValueError(f"MASTER_PORT={nodes.port}: {os.strerror(error.errno)} on this host: end what uses it, or "
                         "give another port on every node") from None  # fmt: skip
    listener.setblocking(False)
    return listener


def saved_step(checkpoints: Path) -> int | None:
    """Of the newest whole checkpoint; None while there is none."""
    try:
        return int((checkpoints / TRACKER).read_text())
    except (OSError, ValueError):
        return None


def checkpoint_directory(flags: list[str]) -> Path:
    """Where the run saves and loads. ValueError unless that is one place: a restart would begin anew."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--save")
    parser.add_argument("--load")
    given = parser.parse_known_args(flags)[0]
    missing = [f"--{name}" for name in ("save", "load") if not getattr(given, name)]
    if missing:
        raise ValueError(f"no {' and no '.join(missing)}: a restart would begin anew; add --save DIR --load DIR")
    if os.path.realpath(given.save) != os.path.realpath(given.load):
        raise ValueError(f"--save {given.save} is not --load {given.load}: a restart would not go on from what the run "
                         "saved; give one directory to both")  # fmt: skip
    return Path(given.save)


def say(line: str) -> None:
    print(f"launch: {line}", file=sys.stderr, flush=True)
