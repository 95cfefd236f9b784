"""Processes started by multiprocessing that must not outlive the one that started them."""

import multiprocessing.connection
import os
import signal
import threading


def end_with_parent() -> None:
    """This process, started by multiprocessing, ends when the one that started it is gone, however it went. A terminal
    sends Ctrl-C to both: what becomes of it is the other's affair."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_wait_for_parent, daemon=True).start()


def _wait_for_parent() -> None:
    multiprocessing.connection.wait([multiprocessing.parent_process().sentinel])
    os._exit(1)
