"""The launcher as a process, before it imports torch: its signals, what its ranks inherit, what it prints."""

import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import Callable, MutableMapping

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def handle_signals(handler: Callable) -> None:
    for number in SIGNALS:
        if signal.getsignal(number) != signal.SIG_IGN:  # as nohup sets SIGHUP
            signal.signal(number, handler)


def leave(number: int, frame) -> None:
    """The handler while there are no ranks."""
    sys.exit(128 + number)


OF_A_RANK = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")


def check_rank_environment(environment: MutableMapping[str, str] = os.environ) -> None:
    """An empty variable of a rank counts as not set. Raises ValueError for one that is no number, or half of them."""
    for name in OF_A_RANK:
        value = environment.get(name)
        if value is not None and not value.strip():
            del environment[name]
        elif value is not None and not value.isdecimal():
            raise ValueError(f"{name}={value!r:.40} in the environment is no number: unset it, or start with torchrun")
    if ("RANK" in environment) != ("WORLD_SIZE" in environment):
        one, other = ("RANK", "WORLD_SIZE") if "RANK" in environment else ("WORLD_SIZE", "RANK")
        raise ValueError(f"{one} is in the environment without {other}: unset it, or start with torchrun")


def tell_torchrun(line: str) -> None:
    """Why this rank ends, for the report with which torchrun ends: without it that says how to enable tracebacks."""
    if path := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        reason = {"message": line, "extraInfo": {"timestamp": int(time.time())}}
        with contextlib.suppress(OSError), open(path, "w", encoding="utf-8") as file:
            json.dump({"message": reason}, file)


def set_environment(ranks: int) -> None:
    """What the ``ranks`` ranks of this node and torch's agent find in the environment; the user's settings win."""
    for name in [name for name in os.environ if name.startswith("TORCHELASTIC_")]:  # of a torchrun around the launcher
        del os.environ[name]
    if ranks > 1:
        os.environ.setdefault("OMP_NUM_THREADS", "1")  # as torchrun
    # Megatron asks for it with tensor parallelism on GPUs older than Blackwell.
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    # Of the agent: signals are ours, and no store is shared by attempts (pytorch issue 135712).
    os.environ |= {"TORCHELASTIC_SIGNALS_TO_HANDLE": "", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}


def say(line: str) -> None:
    print(f"launch: {line}", file=sys.stderr, flush=True)


def alone_without_torchrun() -> None:
    """Let one process start without torchrun: it is a world of one."""
    if "RANK" in os.environ:
        return
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
    # Port 0: the system gives a free one when the store is made. One looked for now may be taken by then.
    os.environ.update(alone | {"MASTER_ADDR": "localhost", "MASTER_PORT": "0"})
