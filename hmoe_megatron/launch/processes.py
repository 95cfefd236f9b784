"""The ranks of one node as processes, none of which outlives the launcher."""

import contextlib
import ctypes
import os
import signal
import subprocess
from collections.abc import Mapping

PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None, use_errno=True)


def die_with(parent: int):
    """What a child runs before its program: the kernel kills it when ``parent`` is gone, however that went."""

    def prepare() -> None:
        _libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # gone already
            os._exit(1)

    return prepare


class Ranks:
    """The ranks of one attempt."""

    def __init__(self, command: list[str], first: int, count: int, world: int, address: str, port: int):
        """Start ``count`` ranks from ``first`` of ``world``; rank 0 of all listens at ``address:port``."""
        self.first = first
        self.processes: list[subprocess.Popen] = []
        self.ours: set[int] = set()  # local ranks that we killed: how they end is no failure
        self.seen: set[int] = set()
        shared = {"WORLD_SIZE": world, "LOCAL_WORLD_SIZE": count, "MASTER_ADDR": address, "MASTER_PORT": port}
        try:
            for local in range(count):
                own = rank_environment(os.environ, RANK=first + local, LOCAL_RANK=local, **shared)
                # A session of its own: Ctrl-C reaches a rank through the launcher, and with it go its children.
                self.processes.append(
                    subprocess.Popen(command, env=own, stdin=subprocess.DEVNULL, start_new_session=True,
                                     preexec_fn=die_with(os.getpid()))
                )  # fmt: skip
        except OSError:
            self.kill()
            raise

    def new_failures(self) -> list[tuple[int, int]]:
        """(rank, code) of those that failed since the last call; killed ones first, for the others follow from them."""
        codes = {local: process.poll() for local, process in enumerate(self.processes)}
        failed = {local for local, code in codes.items() if code} - self.seen - self.ours
        self.seen |= failed
        for local in failed:  # its data loaders hold its connections open: while they live, no other rank sees it gone
            self._kill_group(local)
        return sorted(((self.first + local, codes[local]) for local in failed), key=lambda of: (of[1] > 0, of[0]))

    def running(self) -> bool:
        return any(process.poll() is None for process in self.processes)

    def send_signal(self, number: int) -> None:
        """Of SIGINT to what they started too, as a terminal does: a rank that Ctrl-C ends waits for its data loaders,
        which take no other signal where Megatron handles SIGTERM."""
        for process in self.processes:
            if process.poll() is None:
                (os.killpg if number == signal.SIGINT else os.kill)(process.pid, number)

    def kill(self) -> None:
        """Kill them and what they started, and wait for them."""
        self.ours |= {local for local, process in enumerate(self.processes) if process.poll() is None}
        for local in range(len(self.processes)):
            self._kill_group(local)
        for process in self.processes:
            process.wait()

    def _kill_group(self, local: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.processes[local].pid, signal.SIGKILL)


def rank_environment(environment: Mapping[str, str], **numbers) -> dict[str, str]:
    """``environment`` for a rank, without what a torchrun around the launcher may have left."""
    kept = {name: value for name, value in environment.items() if not name.startswith("TORCHELASTIC_")}
    if numbers["LOCAL_WORLD_SIZE"] > 1:
        kept.setdefault("OMP_NUM_THREADS", "1")  # as torchrun
    # Megatron asks for it with tensor parallelism on GPUs older than Blackwell; one's own setting wins.
    kept.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    return kept | {name: str(value) for name, value in numbers.items()}
