"""Two hosts on this machine: network namespaces joined by a pair of virtual interfaces. Needs root.

Names do not resolve in them as between real hosts (both have this machine's), so nothing may depend on names.
"""

import contextlib
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator

ADDRESSES = ("10.231.77.1", "10.231.77.2")
GONE_S = 30


def no_hosts() -> str | None:
    """Why there can be none on this machine; None if there can."""
    if not shutil.which("ip"):
        return "no ip command (package iproute2)"
    try:
        with two_hosts():
            return None
    except RuntimeError as error:
        return f"no network namespaces: {error}"


@contextlib.contextmanager
def two_hosts() -> Iterator[tuple[list[str], list[str]]]:
    """Words to put before a command that shall run on the first and on the second host, whose addresses are ADDRESSES
    and whose interfaces are ``wire``. Takes them down, and what still runs in them, at the end. RuntimeError where this
    machine does not allow them."""
    names = [f"hmoe-host{number}-{os.getpid()}" for number in range(2)]
    try:
        for left in re.findall(r"hmoe-host\d-(\d+)", _ip("netns", "list")):  # by tests that were killed
            if not os.path.exists(f"/proc/{left}"):
                _take_down([f"hmoe-host{number}-{left}" for number in range(2)])
        for name in names:
            _ip("netns", "add", name)
            _ip("-n", name, "link", "set", "lo", "up")
        _ip("-n", names[0], "link", "add", "wire", "type", "veth", "peer", "name", "wire", "netns", names[1])
        for name, address in zip(names, ADDRESSES, strict=True):
            _ip("-n", name, "address", "add", f"{address}/24", "dev", "wire")
            _ip("-n", name, "link", "set", "wire", "up")
        first, second = (["ip", "netns", "exec", name] for name in names)
        yield first, second
    finally:
        _take_down(names)


def _take_down(names: list[str]) -> None:
    for name in names:
        if os.path.exists(f"/run/netns/{name}"):
            for pid in pids([name]):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            _ip("netns", "delete", name)


def pids(host: list[str]) -> list[int]:
    """Of the processes on a host."""
    return [int(pid) for pid in _ip("netns", "pids", host[-1]).split()]


def assert_empty(host: list[str]) -> None:
    """No process is left on the host, at the latest after GONE_S."""
    until = time.monotonic() + GONE_S
    while left := pids(host):
        assert time.monotonic() < until, f"still there: {left}"
        time.sleep(0.1)


def _ip(*words: str) -> str:
    done = subprocess.run(["ip", *words], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"ip {' '.join(words)}: {done.stderr.strip()}")
    return done.stdout
