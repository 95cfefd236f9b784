"""Where all launchers meet before every attempt: torch's c10d rendezvous, and node 0's decision whether to go on."""

import contextlib
import json
import os
import signal
import socket
import time
from dataclasses import astuple
from datetime import timedelta

from torch.distributed import DistError, Store, TCPStore
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.rendezvous import RendezvousConnectionError, RendezvousInfo, RendezvousStoreInfo
from torch.distributed.elastic.rendezvous.api import RendezvousGracefulExitError
from torch.distributed.elastic.rendezvous.c10d_rendezvous_backend import C10dRendezvousBackend
from torch.distributed.elastic.rendezvous.dynamic_rendezvous import DynamicRendezvousHandler, RendezvousTimeout

from hmoe_megatron.launch.nodes import Nodes
from hmoe_megatron.launch.policy import Failure, Restarts
from hmoe_megatron.launch.process import say

RUN = "hmoe"
SILENT_S, KEEP_ALIVE_S = 20, 2  # a launcher that is silent for so long is lost; it is heard so often
POLL_S = 0.05
LAST_WORDS_S = 5.0
STORE_LOST = (DistError, RendezvousConnectionError)


class Rendezvous(DynamicRendezvousHandler):
    """Of one launcher. Keys in the store: ``end`` why the run ends, ``left`` launchers that know it; of an attempt:
    ``launcher<node>``, ``go``, ``failures``, ``done<node>``."""

    use_agent_store = True  # ranks are clients of the store that node 0's launcher makes for each attempt
    attempt: Store | None = None  # the last one that started

    @classmethod
    def of(cls, nodes: Nodes, store: Store, join_s: float, restarts: Restarts) -> "Rendezvous":
        """restarts: node 0's are used."""
        backend, timeout = C10dRendezvousBackend(store, RUN), RendezvousTimeout(join=timedelta(seconds=join_s))
        count, address = nodes.count, _address(nodes.rank)
        self = cls.from_backend(
            RUN, store, backend, count, count, address, timeout, KEEP_ALIVE_S, SILENT_S // KEEP_ALIVE_S
        )
        self.nodes, self.restarts = nodes, restarts
        return self

    def next_rendezvous(self) -> RendezvousInfo:
        """Wait until all launchers are here, none of which has ranks then, and for node 0's decision.

        ValueError if another launcher has the same NODE_RANK."""
        info = super().next_rendezvous()
        if self.absent() and self._this_node != min(node for node in self._here() if node.addr == self._this_node.addr):
            raise ValueError(self.taken())
        info.store.set(f"launcher{info.rank}", json.dumps([socket.gethostname(), os.getpid()]))
        if info.rank == 0 and not self.absent():
            self._start_or_end(info.store)
        while not info.store.check(["go"]):
            if self.num_nodes_waiting():  # one left, or was here twice in the place of another
                return self.next_rendezvous()
            time.sleep(POLL_S)
        self.attempt = info.store
        place = RendezvousStoreInfo(self.nodes.address, int(info.store.get("go")))
        return RendezvousInfo(info.store, info.rank, info.world_size, place)

    def _start_or_end(self, attempt: Store) -> None:
        wait_s = 0.0
        if self.attempt:
            code, line, wait_s = self.restarts.decide(self._failures(self.attempt, attempt))
            if code is None:
                say(line)
            else:
                self.end(code, line)
        until = time.monotonic() + wait_s
        self.raise_if_ended()
        while time.monotonic() < until:
            time.sleep(POLL_S)
            self.raise_if_ended()
        # A new one: among the last attempt's keys gloo finds the addresses of ranks that are gone.
        self._ranks_store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        attempt.set("go", str(self._ranks_store.port))

    def _failures(self, before: Store, after: Store) -> list[Failure]:
        """Of the last attempt: launchers that are others now, then ranks in the order in which they were reported."""
        lost = []
        for key in (f"launcher{node}" for node in range(self.nodes.count)):
            was, now = before.get(key) if before.check([key]) else b'["?", 0]', after.get(key)
            if was != now:
                lost.append(Failure(json.loads(was)[0], None, 1))
        reported = before.get("failures").splitlines() if before.check(["failures"]) else []
        return lost + [Failure(*json.loads(line)) for line in reported] or [Failure("a silent host", None, 1)]

    def report(self, failure: Failure) -> None:
        with contextlib.suppress(*STORE_LOST):
            self.attempt.append("failures", json.dumps(astuple(failure)) + "\n")

    def all_done(self) -> bool:
        """Whether the ranks of all nodes ended well, as those of this node did."""
        self.attempt.set(f"done{self.nodes.rank}", "")
        return self.attempt.check([f"done{node}" for node in range(self.nodes.count)])

    def num_nodes_waiting(self) -> int:
        """More than 0, and the agent ends its ranks and comes to the next rendezvous: also when a launcher is lost."""
        self.raise_if_ended()
        return super().num_nodes_waiting() or len(self.absent())

    def absent(self) -> list[int]:
        """Nodes whose launchers are not here."""
        here = {node.addr for node in self._here()}
        return [node for node in range(self.nodes.count) if _address(node) not in here and node != self.nodes.rank]

    def _here(self) -> set:
        with self._heartbeat_lock:
            self._state_holder.sync()
            return {*self._state_holder.state.participants, *self._state_holder.state.wait_list}

    def taken(self) -> str:
        return f"NODE_RANK={self.nodes.rank} is taken by another launcher"

    def end(self, code: int, line: str = "", number: int | None = None, kill: bool = False) -> None:
        """Make all launchers end: with an exit code, or handing signal ``number`` to their ranks, or killing them."""
        with contextlib.suppress(*STORE_LOST):
            self._store.set("end", json.dumps([code, line, number, kill]))
            if not kill:  # closed already; and a signal handler must not wait for the heartbeat's lock
                self.set_closed()

    def ending(self) -> list | None:
        """What `end` was called with, by whichever launcher."""
        with contextlib.suppress(*STORE_LOST):
            return json.loads(self._store.get("end")) if self._store.check(["end"]) else None

    @property
    def kill(self) -> bool:
        return bool((self.ending() or [False])[-1])

    def raise_if_ended(self) -> None:
        """SignalException where the ranks shall get a signal first, else RendezvousGracefulExitError."""
        if ending := self.ending():
            _, line, number, _ = ending
            raise SignalException(line, signal.Signals(number)) if number else RendezvousGracefulExitError(line)

    def leave(self) -> None:
        """Node 0 leaves last, for the store ends with its launcher."""
        self._stop_heartbeats()
        with contextlib.suppress(*STORE_LOST):
            left, until = self._store.add("left", 1), time.monotonic() + LAST_WORDS_S
            while self.nodes.rank == 0 and left < self.nodes.count and time.monotonic() < until:
                time.sleep(POLL_S)
                left = self._store.add("left", 0)


def _address(node: int) -> str:
    """c10d numbers launchers in the order of their addresses: these put them in the order of NODE_RANK."""
    return f"{node:06}"
