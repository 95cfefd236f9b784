"""Messages between coordinator and nodes: JSON objects, one a line, over TCP."""

import json
import socket

MAX_BYTES = 1 << 16
SILENT_S = 20  # a host that loses power closes nothing: it is asked every 5 s, and given up after this long


class Channel:
    """One connection. `receive` raises ConnectionError once it is of no more use; `send` never raises."""

    def __init__(self, connection: socket.socket):
        self.connection, self.buffer = connection, b""
        connection.setblocking(False)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in (("KEEPIDLE", 5), ("KEEPINTVL", 5), ("KEEPCNT", 3), ("USER_TIMEOUT", SILENT_S * 1000)):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, f"TCP_{option}"), value)

    def send(self, kind: str, **values) -> None:
        try:
            self.connection.sendall(json.dumps({"kind": kind, **values}).encode() + b"\n")
        except OSError:
            self.close()  # the next receive says so

    def receive(self) -> list[dict]:
        """Messages that are there now, each with a ``kind``."""
        try:
            while data := self.connection.recv(MAX_BYTES):
                self.buffer += data
                if len(self.buffer) > MAX_BYTES:
                    raise ConnectionError("too long a message")
            if b"\n" not in self.buffer:  # else its last words first
                raise ConnectionError("closed")
        except BlockingIOError:
            pass
        except OSError as error:
            raise ConnectionError(str(error)) from None
        *lines, self.buffer = self.buffer.split(b"\n")
        try:
            messages = [json.loads(line) for line in lines]
        except (ValueError, RecursionError):  # no JSON, or too deep
            raise ConnectionError("not JSON") from None
        if not all(isinstance(message, dict) and "kind" in message for message in messages):
            raise ConnectionError("not a message")
        return messages

    def close(self) -> None:
        self.connection.close()
