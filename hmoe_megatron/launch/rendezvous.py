"""Where the nodes meet before every attempt: torch's c10d rendezvous, and node 0's decision whether to go on."""

import contextlib
import json
import os
import signal
import socket
import time
from collections.abc import Callable
from dataclasses import astuple
from datetime import timedelta

from torch.distributed import DistError, PrefixStore, Store, TCPStore
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.rendezvous import RendezvousConnectionError, RendezvousInfo, RendezvousStoreInfo
from torch.distributed.elastic.rendezvous.api import RendezvousGracefulExitError
from torch.distributed.elastic.rendezvous.c10d_rendezvous_backend import C10dRendezvousBackend
from torch.distributed.elastic.rendezvous.dynamic_rendezvous import DynamicRendezvousHandler, RendezvousTimeout

from hmoe_megatron.launch.nodes import Nodes
from hmoe_megatron.launch.policy import Decision, Failure
from hmoe_megatron.launch.process import say

RUN = "hmoe"
KEEP_ALIVE_S, KEEP_ALIVE_TIMES = 2, 10  # a node that is silent for 20 s is lost
POLL_S = 0.05
LAST_WORDS_S = 5.0
STORE_LOST = (DistError, RendezvousConnectionError)


class Rendezvous(DynamicRendezvousHandler):
    """One launcher's. Keys of the store: ``end`` why the run ends, ``kill`` ranks get no more time, ``left`` launchers
    that read ``end``; of an attempt: ``launcher<node>``, ``go``, ``failures``, ``done``."""

    use_agent_store = True  # ranks are clients of the store that node 0's launcher makes for each attempt

    @classmethod
    def of(cls, nodes: Nodes, store: Store, join_s: float, decide: Callable[[list[Failure]], Decision]):
        """decide: called on node 0 with the failures of the attempt that ended. ValueError if NODE_RANK is taken."""
        # Launchers are ranked by the order of these names, so by NODE_RANK.
        self = cls.from_backend(
            RUN,
            store,
            C10dRendezvousBackend(store, RUN),
            nodes.count,
            nodes.count,
            _name(nodes.rank),
            RendezvousTimeout(join=timedelta(seconds=join_s)),
            KEEP_ALIVE_S,
            KEEP_ALIVE_TIMES,
        )
        self.nodes, self.decide = nodes, decide
        self.attempt: PrefixStore | None = None
        self.counted = False  # this node in ``done``
        self._refuse_twin()
        return self

    def _refuse_twin(self) -> None:
        """A launcher that was killed is forgotten after a while; one that still lives keeps its place."""
        until = time.monotonic() + KEEP_ALIVE_S * (KEEP_ALIVE_TIMES + 2)
        while _name(self.nodes.rank) in self._present():
            if time.monotonic() > until:
                raise ValueError(f"NODE_RANK={self.nodes.rank} is taken by another launcher")
            self.raise_if_ended()
            time.sleep(POLL_S)

    def _present(self) -> set[str]:
        with self._heartbeat_lock:
            self._state_holder.sync()
            return {node.addr for node in {*self._state_holder.state.participants, *self._state_holder.state.wait_list}}

    def absent(self) -> list[int]:
        """Nodes whose launchers are not here."""
        present = self._present() | {_name(self.nodes.rank)}
        return [node for node in range(self.nodes.count) if _name(node) not in present]

    def next_rendezvous(self) -> RendezvousInfo:
        """Wait until all launchers are here, none of which has ranks then, and for node 0's decision."""
        info, before = super().next_rendezvous(), self.attempt
        self.attempt, self.counted = info.store, False
        self.attempt.set(f"launcher{info.rank}", json.dumps([socket.gethostname(), os.getpid()]))
        if info.rank == 0:
            self._start_or_end(before)
        while not self.attempt.check(["go"]):
            self.raise_if_ended()
            time.sleep(POLL_S)
        port = int(self.attempt.get("go"))
        return RendezvousInfo(info.store, info.rank, info.world_size, RendezvousStoreInfo(self.nodes.address, port))

    def _start_or_end(self, before: Store | None) -> None:
        if before:
            decision = self.decide(self._failures(before))
            if decision.code is not None:
                self.end(decision.code, decision.line)
                self.raise_if_ended()
            say(decision.line)
            until = time.monotonic() + decision.wait_s
            while time.monotonic() < until:
                self.raise_if_ended()
                time.sleep(POLL_S)
        # A new one: with the last attempt's keys in it gloo finds the addresses of ranks that are gone.
        self._store_of_ranks = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self.attempt.set("go", str(self._store_of_ranks.port))

    def _failures(self, before: Store) -> list[Failure]:
        """Of the last attempt: launchers that are others now, then ranks in the order in which they were reported."""
        lost = []
        for node in range(self.nodes.count):
            key = f"launcher{node}"
            host, pid = json.loads(before.get(key)) if before.check([key]) else ("?", None)
            if [host, pid] != json.loads(self.attempt.get(key)):
                lost.append(Failure(host, None, 1))
        reported = before.get("failures").splitlines() if before.check(["failures"]) else []
        return lost + [Failure(*json.loads(line)) for line in reported] or [Failure("?", None, 1)]

    def report(self, failure: Failure) -> None:
        with contextlib.suppress(*STORE_LOST):
            self.attempt.append("failures", json.dumps(astuple(failure)) + "\n")

    def all_done(self) -> bool:
        """Whether the ranks of all nodes ended well, as those of this node did."""
        if not self.counted:
            self.attempt.add("done", 1)
            self.counted = True
        return self.attempt.add("done", 0) == self.nodes.count

    def num_nodes_waiting(self) -> int:
        """More than 0, and the agent ends its ranks and comes to the next rendezvous: also when a launcher is lost."""
        self.raise_if_ended()
        return super().num_nodes_waiting() or len(self.absent())

    def end(self, code: int, line: str = "", number: int | None = None) -> None:
        """Tell all launchers to end: with an exit code, or handing signal ``number`` to their ranks."""
        with contextlib.suppress(*STORE_LOST):
            self._store.set("end", json.dumps([code, line, number]))
            self.set_closed()

    def raise_if_ended(self) -> None:
        """RendezvousGracefulExitError or, with ranks to hand a signal to, SignalException."""
        code, line, number = self.ending() or (None, "", None)
        if number:
            raise SignalException(line, signal.Signals(number))
        if code is not None:
            raise RendezvousGracefulExitError(line)

    def ending(self) -> tuple[int, str, int | None] | None:
        return json.loads(self._store.get("end")) if self._store.check(["end"]) else None

    def kill(self) -> None:
        with contextlib.suppress(*STORE_LOST):
            self._store.set("kill", "")

    def killed(self) -> bool:
        with contextlib.suppress(*STORE_LOST):
            return self._store.check(["kill"])
        return False

    def leave(self) -> None:
        """Node 0 leaves last, for the store ends with its launcher."""
        self._stop_heartbeats()
        with contextlib.suppress(*STORE_LOST):
            self._store.add("left", 1)
            until = time.monotonic() + LAST_WORDS_S
            while not self.nodes.rank and self._store.add("left", 0) < self.nodes.count and time.monotonic() < until:
                time.sleep(POLL_S)


def _name(node: int) -> str:
    return f"{node:06}"
