"""Where all launchers meet before every attempt: torch's c10d rendezvous, and node 0's decision whether to go on."""

import contextlib
import json
import os
import signal
import socket
import time
from collections.abc import Callable
from dataclasses import astuple
from datetime import timedelta

from torch.distributed import DistError, Store, TCPStore
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.rendezvous import RendezvousConnectionError, RendezvousInfo, RendezvousStoreInfo
from torch.distributed.elastic.rendezvous.api import RendezvousGracefulExitError
from torch.distributed.elastic.rendezvous.c10d_rendezvous_backend import C10dRendezvousBackend
from torch.distributed.elastic.rendezvous.dynamic_rendezvous import DynamicRendezvousHandler, RendezvousTimeout

from hmoe_megatron.launch.nodes import Nodes
from hmoe_megatron.launch.policy import Decision, Failure
from hmoe_megatron.launch.process import say

RUN = "hmoe"
KEEP_ALIVE_S, KEEP_ALIVE_TIMES = 2, 10  # a launcher that is silent for 20 s is lost
POLL_S = 0.05
LAST_WORDS_S = 5.0
STORE_LOST = (DistError, RendezvousConnectionError)


class Rendezvous(DynamicRendezvousHandler):
    """Of one launcher. Keys in the store: ``end`` why the run ends, ``left`` launchers that know it; of an attempt:
    ``launcher<node>``, ``go``, ``failures``, ``done``."""

    use_agent_store = True  # ranks are clients of the store that node 0's launcher makes for each attempt
    attempt: Store | None = None
    counted = False  # this node in ``done``

    @classmethod
    def of(cls, nodes: Nodes, store: Store, join_s: float, decide: Callable[[list[Failure]], Decision]) -> "Rendezvous":
        """decide: called on node 0 with the failures of the attempt that ended."""
        backend, timeout = C10dRendezvousBackend(store, RUN), RendezvousTimeout(join=timedelta(seconds=join_s))
        # c10d numbers launchers in the order of their addresses: these put them in the order of NODE_RANK.
        address = _address(nodes.rank)
        self = cls.from_backend(
            RUN, store, backend, nodes.count, nodes.count, address, timeout, KEEP_ALIVE_S, KEEP_ALIVE_TIMES
        )
        self.nodes, self.decide = nodes, decide
        return self

    def next_rendezvous(self) -> RendezvousInfo:
        """Wait until all launchers are here, none of which has ranks then, and for node 0's decision.

        ValueError if another launcher has the same NODE_RANK."""
        info, before = super().next_rendezvous(), self.attempt
        while self.absent():  # so another is here twice
            if self._this_node != min(node for node in self._here() if node.addr == self._this_node.addr):
                raise ValueError(self.taken())
            info = super().next_rendezvous()
        self.attempt, self.counted = info.store, False
        self.attempt.set(f"launcher{info.rank}", json.dumps([socket.gethostname(), os.getpid()]))
        if info.rank == 0:
            self._start_or_end(before)
        while not self.attempt.check(["go"]):
            self.raise_if_ended()
            time.sleep(POLL_S)
        place = RendezvousStoreInfo(self.nodes.address, int(self.attempt.get("go")))
        return RendezvousInfo(info.store, info.rank, info.world_size, place)

    def _start_or_end(self, before: Store | None) -> None:
        decision = self.decide(self._failures(before)) if before else Decision(None, "")
        if decision.code is not None:
            self.end(decision.code, decision.line)
        elif decision.line:
            say(decision.line)
        until = time.monotonic() + decision.wait_s
        self.raise_if_ended()
        while time.monotonic() < until:
            time.sleep(POLL_S)
            self.raise_if_ended()
        # A new one: among the last attempt's keys gloo finds the addresses of ranks that are gone.
        self._ranks_store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self.attempt.set("go", str(self._ranks_store.port))

    def _failures(self, before: Store) -> list[Failure]:
        """Of the last attempt: launchers that are others now, then ranks in the order in which they were reported."""
        keys = [f"launcher{node}" for node in range(self.nodes.count)]
        were = [before.get(key) if before.check([key]) else b'["?", 0]' for key in keys]
        lost = [
            Failure(json.loads(was)[0], None, 1)
            for key, was in zip(keys, were, strict=True)
            if was != self.attempt.get(key)
        ]
        reported = before.get("failures").splitlines() if before.check(["failures"]) else []
        return lost + [Failure(*json.loads(line)) for line in reported] or [Failure("a silent host", None, 1)]

    def report(self, failure: Failure) -> None:
        with contextlib.suppress(*STORE_LOST):
            self.attempt.append("failures", json.dumps(astuple(failure)) + "\n")

    def all_done(self) -> bool:
        """Whether the ranks of all nodes ended well, as those of this node did."""
        done = self.attempt.add("done", 0 if self.counted else 1)
        self.counted = True
        return done == self.nodes.count

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
    return f"{node:06}"
