"""A run on this node from the first attempt to its end."""

import os
import socket
import sys
import tempfile
import time
from pathlib import Path

import psutil
from torch.distributed import Store, TCPStore
from torch.distributed.elastic.agent.server.api import WorkerSpec
from torch.distributed.elastic.multiprocessing.api import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.rendezvous import RendezvousClosedError, RendezvousTimeoutError

from hmoe_megatron.launch.agent import Agent
from hmoe_megatron.launch.nodes import Nodes
from hmoe_megatron.launch.policy import Restarts
from hmoe_megatron.launch.process import handle_signals, leave, say
from hmoe_megatron.launch.rendezvous import POLL_S, SILENT_S, STORE_LOST, Rendezvous

CONNECT_TIMEOUT_S = 2.0
NO_LIMIT = 10**9


def supervise(nodes: Nodes, command: list[str], ranks: int, restarts: Restarts, join_s: float, stop_s: float) -> int:
    """Run ``command`` as ``ranks`` ranks of this node until it is done or given up.

    join_s: in which the launchers must find each other; stop_s: for the ranks to end at a signal.
    Returns 0, 1 (given up), 2 or 3 (refused, as the ranks ended), 128 + the signal that stopped it. ValueError where
    node 0 can't listen at its port, or this NODE_RANK is taken."""
    command = [str(Path(__file__).with_name("rank.py")), str(os.getpid()), *command]
    with tempfile.TemporaryDirectory(prefix="launch-") as logs:
        while True:
            store = _connect(nodes, join_s) if nodes.rank else _listen(nodes)
            if store is None:
                return 1
            rendezvous = Rendezvous.of(nodes, store, join_s, restarts)
            spec = WorkerSpec("rank", ranks, rendezvous, None, sys.executable, tuple(command), max_restarts=NO_LIMIT)
            agent = Agent(spec, DefaultLogsSpecs(logs), shutdown_timeout=stop_s)
            handle_signals(agent.on_signal)
            try:
                return _run(agent, rendezvous, join_s)
            except STORE_LOST:
                say(f"node 0's launcher is gone: ended the ranks here, looking for it for {join_s:g} s")
                handle_signals(leave)


def _run(agent: Agent, rendezvous: Rendezvous, join_s: float) -> int:
    try:
        result = agent.run()
        if result is not None:
            return int(result.is_failed())
    except (SignalException, RendezvousClosedError):
        pass  # another launcher may have said why
    except RendezvousTimeoutError:
        absent = ", ".join(f"node {node}'s" for node in rendezvous.absent())
        if not absent:
            raise ValueError(rendezvous.taken()) from None
        remedy = "start it on every node (NODE_RANK), with this MASTER_ADDR and MASTER_PORT"
        rendezvous.end(1, f"{absent} launcher did not come in {join_s:g} s: {remedy}")
    code, line, *_ = rendezvous.ending()
    if line:
        say(line)
    rendezvous.leave()
    return code


def _listen(nodes: Nodes) -> Store:
    """Node 0's store: of one node on the loopback at any port, of several at all addresses."""
    place = ("", nodes.port) if nodes.count > 1 else ("127.0.0.1", 0)
    try:
        listener = socket.create_server(place, backlog=1024)
    except OSError as error:
        remedy = "end what uses it, or give another port on every node"
        raise ValueError(f"MASTER_PORT={nodes.port}: {os.strerror(error.errno)} on this host: {remedy}") from None
    port = listener.getsockname()[1]
    store = TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach())
    store.set("nodes", str(nodes.count))
    return store


def _connect(nodes: Nodes, join_s: float) -> Store | None:
    """The store of node 0, None if it is not found. ValueError if its run has another number of nodes."""
    until, error = time.monotonic() + join_s, None
    while time.monotonic() < until:
        try:
            socket.create_connection((nodes.address, nodes.port), CONNECT_TIMEOUT_S).close()
            store = TCPStore(nodes.address, nodes.port, is_master=False, wait_for_workers=False)
            _notice_lost_host(nodes.port)
            count = int(store.get("nodes"))
        except (OSError, *STORE_LOST) as failed:
            error = failed
            time.sleep(POLL_S * 10)
            continue
        if count != nodes.count:
            raise ValueError(f"NODE_RANK={nodes.rank} of NNODES={nodes.count}, but node 0 has {count}")
        return store
    remedy = "start its launcher, or check MASTER_ADDR and MASTER_PORT"
    say(f"node 0 not found at {nodes.address}:{nodes.port} in {join_s:g} s ({error}): {remedy}")
    return None


def _notice_lost_host(port: int) -> None:
    """A host that loses power closes no connection: the kernel gives up the one to the store after `SILENT_S`."""
    for connection in psutil.Process().net_connections("tcp"):
        if connection.raddr and connection.raddr.port == port:
            with socket.socket(fileno=os.dup(connection.fd)) as of_store:
                of_store.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, SILENT_S * 1000)
