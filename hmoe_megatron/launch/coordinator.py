"""Node 0's part: starts every attempt on all nodes at once, and decides after its end. It alone counts."""

import socket
import time
from collections.abc import Callable
from dataclasses import dataclass

from hmoe_megatron.launch.channel import Channel
from hmoe_megatron.launch.nodes import Nodes, reserved_port
from hmoe_megatron.launch.policy import REFUSED, Failure, Restarts, cause

GONE = 1  # the code of a node whose launcher is gone


@dataclass
class Member:
    """A node that said hello. running: it has ranks, as far as it told."""

    channel: Channel
    host: str
    ranks: int
    running: bool = False


class Coordinator:
    """`tick` for ever; once `code` is not None it has told every node to end."""

    def __init__(self, nodes: Nodes, listener: socket.socket, restarts: Restarts, saved_step: Callable[[], int | None],
                 say: Callable[[str], None], join_s: float):  # fmt: skip
        """saved_step: of the newest checkpoint, None while there is none."""
        self.nodes, self.listener, self.restarts, self.saved_step, self.say = nodes, listener, restarts, saved_step, say
        self.join_s = join_s
        self.code: int | None = None
        self.strangers: list[Channel] = []  # connected, and not yet said who they are
        self.members: dict[int, Member] = {}
        self.failures: list[Failure] = []
        self.attempting, self.signalled = False, None
        self.held = reserved_port()
        self.step_before: int | None = None
        self._wait(0.0)

    def tick(self) -> None:
        self._greet()
        for node in list(self.members):
            self._hear(node)
        if self.code is not None:
            return
        if self.attempting:
            if not any(member.running for member in self.members.values()):
                self._decide()
        elif self.signalled:
            self._end(128 + self.signalled, "")
        elif time.monotonic() >= self.start_at:
            self._start()

    def _wait(self, seconds: float) -> None:
        self.attempting = False
        self.start_at = time.monotonic() + seconds
        self.join_by = self.start_at + self.join_s

    def _start(self) -> None:
        lacking = [node for node in range(self.nodes.count) if node not in self.members]
        if lacking and time.monotonic() > self.join_by:
            self._end(1, f"node {lacking[0]}'s launcher did not come in {self.join_s:g} s: start it on every node "
                         "(NODE_RANK), with this MASTER_ADDR and MASTER_PORT")  # fmt: skip
        if lacking:
            return
        self.failures, self.attempting, self.step_before = [], True, self.saved_step()
        self.held.close()
        self.held = reserved_port()
        world, first, port = sum(member.ranks for member in self.members.values()), 0, self.held.getsockname()[1]
        for node in range(self.nodes.count):
            member = self.members[node]
            member.channel.send("start", first=first, world=world, address=self.nodes.address, port=port)
            member.running = True
            first += member.ranks

    def _greet(self) -> None:
        try:
            while True:
                self.strangers.append(Channel(self.listener.accept()[0]))
        except OSError:  # nobody is waiting
            pass
        for channel in list(self.strangers):
            try:
                messages = channel.receive()
                if not messages:
                    continue
                node, count, ranks, host = (messages[0][name] for name in ("node", "nodes", "ranks", "host"))
                if not all(isinstance(number, int) for number in (node, count, ranks)):
                    raise ConnectionError("not a hello")
            except (ConnectionError, KeyError):
                channel.close()
            else:
                self._admit(channel, Member(channel, str(host), ranks), node, count)
            self.strangers.remove(channel)

    def _admit(self, channel: Channel, member: Member, node: int, count: int) -> None:
        if count != self.nodes.count or node not in range(count):
            channel.send("end", code=2, line=f"NODE_RANK={node} of NNODES={count}, but node 0 has {self.nodes.count}")
        elif node in self.members:
            channel.send("end", code=2, line=f"NODE_RANK={node} is taken by the launcher on {self.members[node].host}")
        else:
            self.members[node] = member

    def _hear(self, node: int) -> None:
        member = self.members[node]
        try:
            for message in member.channel.receive():
                self._take(node, member, message)
        except (ConnectionError, KeyError, TypeError, ValueError):
            member.channel.close()
            del self.members[node]
            if self.attempting:
                self._fail([Failure(member.host, None, GONE)])

    def _take(self, node: int, member: Member, message: dict) -> None:
        if message["kind"] in ("failing", "down"):
            self._fail([Failure(member.host, int(rank), int(code)) for rank, code in message["failures"]])
            member.running = member.running and message["kind"] != "down"
        elif message["kind"] == "signalled":
            self.signalled = int(message["signal"])
            for other, of in self.members.items():
                if message["again"]:
                    of.channel.send("stop")
                elif other != node:
                    of.channel.send("signal", signal=self.signalled)

    def _fail(self, failures: list[Failure]) -> None:
        self.failures += failures
        if failures:
            for member in self.members.values():
                member.channel.send("stop")

    def _decide(self) -> None:
        """After an attempt: the end, or when the next begins."""
        if self.signalled:
            return self._end(128 + self.signalled, "")
        if not self.failures:
            return self._end(0, "")
        failure = cause(self.failures)
        if why := REFUSED.get(failure.code):
            return self._end(failure.code, f"{failure}: {why}, no restart")
        step = self.saved_step()
        wait_s = self.restarts.wait_s(step is not None and step > (self.step_before or 0))
        if wait_s is None:
            return self._end(1, f"{failure}: {self.restarts.limit} restarts without a new checkpoint, giving up")
        self.say(f"{failure}: restart {self.restarts.failures} of {self.restarts.limit} from "
                 f"{'the beginning' if step is None else f'step {step}'} in {wait_s:g} s")  # fmt: skip
        return self._wait(wait_s)

    def _end(self, code: int, line: str) -> None:
        self.code = code
        if line:
            self.say(line)
        for member in self.members.values():
            member.channel.send("end", code=code, line=line)
