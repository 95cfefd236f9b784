"""One run at a time saves into a directory."""

import contextlib
import fcntl
import os
import socket
import time
from pathlib import Path
from typing import TextIO

from hmoe_megatron.exits import DirectoryInUse

LOCK_FILE = ".hmoe_lock"
WAIT_S = 10.0  # a run that was killed may take seconds to be gone


def hold(root: Path, wait_s: float = WAIT_S) -> TextIO | None:
    """Lock `root` for as long as the returned file is open and this process lives, however it ends.

    None where the file system knows no locks. Raises DirectoryInUse with the holder after `wait_s`. A record lock, not
    flock's: a process that this one forks (a checkpoint writer, a data loader) does not keep it.
    """
    path = Path(root) / LOCK_FILE
    file = path.open("a+", encoding="utf-8", errors="replace")
    deadline_s = time.monotonic() + wait_s
    while True:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except (BlockingIOError, PermissionError):
            if time.monotonic() > deadline_s:
                raise DirectoryInUse(_in_use(root, file)) from None
            time.sleep(0.2)
        except OSError:
            file.close()
            return None
    with contextlib.suppress(OSError):  # who holds it is for people; a full disk must not end the run here
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}, since {time.strftime('%Y-%m-%d %H:%M:%S')}")
        file.flush()
    return file


def _in_use(root: Path, file: TextIO) -> str:
    file.seek(0)
    holder = file.read(200) or "another process"
    file.close()
    return f"--save {root} is in use by {holder}: wait for that run or end it, or give another --save"
