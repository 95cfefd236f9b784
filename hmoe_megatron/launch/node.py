"""One node of a run: starts, watches and ends its ranks as the coordinator says."""

import socket
import time
from collections.abc import Callable
from dataclasses import dataclass

from hmoe_megatron.launch.channel import Channel
from hmoe_megatron.launch.nodes import Nodes
from hmoe_megatron.launch.processes import Ranks

CONNECT_TIMEOUT_S, CONNECT_EVERY_S = 2.0, 0.5


@dataclass(frozen=True)
class Patience:
    """Seconds. join: to find the other launchers; stop: for ranks to end at SIGTERM or SIGINT; grace: for the other
    ranks to end by themselves, with their own last words, after one failed."""

    join_s: float = 600.0
    stop_s: float = 600.0
    grace_s: float = 2.0


class Node:
    """`tick` until `code` is not None; `signal` hands one on."""

    def __init__(self, nodes: Nodes, command: list[str], ranks: int, patience: Patience, say: Callable[[str], None]):
        self.nodes, self.command, self.count, self.patience, self.say = nodes, command, ranks, patience, say
        self.code: int | None = None
        self.channel: Channel | None = None
        self.ranks: Ranks | None = None
        self.kill_at = float("inf")  # when the patience with the ranks ends
        self.next_try, self.join_by = 0.0, time.monotonic() + patience.join_s
        self.signalled = False

    def tick(self) -> None:
        if self.channel is None:
            self._connect()
        else:
            self._listen()
        if self.ranks:
            self._watch()

    def signal(self, number: int) -> None:
        """Hand a signal to the ranks here and, by the coordinator, to all others; a second one kills."""
        if self.channel is None:
            self.code = 128 + number
            return
        if self.ranks:
            self._hand_on(number)
            if self.signalled:
                self.kill_at = 0.0
        self.channel.send("signalled", signal=number, again=self.signalled)
        self.signalled = True

    def _hand_on(self, number: int) -> None:
        self.ranks.send_signal(number)
        self.kill_at = min(self.kill_at, time.monotonic() + self.patience.stop_s)

    def _connect(self) -> None:
        now = time.monotonic()
        if now < self.next_try:
            return
        self.next_try = now + CONNECT_EVERY_S
        try:
            connection = socket.create_connection((self.nodes.address, self.nodes.port), CONNECT_TIMEOUT_S)
        except OSError as error:
            if now > self.join_by:
                self.code = 1
                self.say(f"node 0 not found at {self.nodes.address}:{self.nodes.port} in {self.patience.join_s:g} s "
                         f"({error}): start its launcher, or check MASTER_ADDR and MASTER_PORT")  # fmt: skip
            return
        self.channel = Channel(connection)
        self.channel.send("hello", node=self.nodes.rank, nodes=self.nodes.count, ranks=self.count,
                          host=socket.gethostname())  # fmt: skip

    def _listen(self) -> None:
        try:
            for message in self.channel.receive():
                self._obey(message)
        except ConnectionError as error:
            if self.code is None:
                self.say(f"node 0's launcher is gone ({error}): ending the ranks here, looking for it for "
                         f"{self.patience.join_s:g} s")  # fmt: skip
                self.close()
                self.join_by = time.monotonic() + self.patience.join_s

    def _obey(self, message: dict) -> None:
        kind = message["kind"]
        if kind == "start" and self.signalled:  # the two crossed
            self.channel.send("down", failures=[])
        elif kind == "start":
            self.kill_at = float("inf")
            try:
                self.ranks = Ranks(self.command, message["first"], self.count, message["world"],
                                   message["address"], message["port"])  # fmt: skip
            except OSError as error:
                self.say(f"{self.command[0]}: {error}")
                self.channel.send("down", failures=[[message["first"], 2]])
        elif kind == "stop":
            self._stop_soon()
        elif kind == "signal" and self.ranks:
            self._hand_on(message["signal"])
        elif kind == "end":
            if self.nodes.rank and message["line"]:
                self.say(message["line"])
            self.code = message["code"]

    def _stop_soon(self) -> None:
        self.kill_at = min(self.kill_at, time.monotonic() + self.patience.grace_s)

    def _watch(self) -> None:
        if failures := self.ranks.new_failures():
            self.channel.send("failing", failures=failures)
            self._stop_soon()
        if time.monotonic() > self.kill_at:
            self.ranks.kill()
        if not self.ranks.running():
            self.ranks.kill()  # what they started
            self.channel.send("down", failures=self.ranks.new_failures())
            self.ranks = None

    def close(self) -> None:
        """End the ranks and the connection."""
        if self.ranks:
            self.ranks.kill()
            self.ranks = None
        if self.channel:
            self.channel.close()
            self.channel = None
