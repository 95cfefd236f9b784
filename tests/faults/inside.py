"""What happens in a rank of a faults test: pretrain_hmoe.py, and the fault that was put into it.

A fault is a module-level function, bound by functools.partial to its arguments after the first, which is the scratch
directory. It is called in every rank before `main`, and does nothing on the ranks that it does not concern.
"""

import errno
import functools
import importlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
import traceback
from pathlib import Path

LOSSES, KILLED, CPU_S = "losses.txt", "killed.txt", "cpu_s.txt"
BALLAST = "ballast"
_mended = False
_phase = "set-up and load"


def pretrain(argv: list[str], scratch: Path, faults: tuple) -> None:
    """Runs the entry point as a process of its own would and ends the process with its exit code.

    Rank 0 writes `step loss` of every step to `scratch`, the loss in hexadecimal.
    """
    import multiprocessing
    import multiprocessing.util

    started_s = time.process_time()
    multiprocessing.set_start_method("fork", force=True)  # what a process that torchrun starts has
    sys.argv = ["pretrain_hmoe.py", *argv]
    _watch_steps(scratch)
    try:
        import pretrain_hmoe

        for fault in faults:
            fault.func(scratch, *fault.args, **fault.keywords)
        code = pretrain_hmoe.main()
    except SystemExit as left:
        code = left.code or 0
    except BaseException:
        traceback.print_exc()
        code = 1
    multiprocessing.util._exit_function()  # joins what the process started, as at its end
    sys.stdout.flush()
    sys.stderr.flush()
    (scratch / CPU_S).write_text(f"{time.process_time() - started_s}")
    os._exit(code)


def rank() -> int:
    return int(os.environ["RANK"])


def _watch_steps(scratch):
    from megatron.core.datasets.gpt_dataset import MockGPTLowLevelDataset
    from megatron.training import training

    MockGPTLowLevelDataset.size = 100  # of its 100,000 documents, whose index costs more than the run

    stock_step, stock_save = training.train_step, training.save_checkpoint_and_time

    @functools.wraps(stock_step)
    def step(*args, iteration, **named):
        _enter("steps")
        out = stock_step(*args, iteration=iteration, **named)
        if rank() == 0 and out[0]:
            with (scratch / LOSSES).open("a") as file:
                file.write(f"{iteration + 1} {float(out[0]['lm loss']).hex()}\n")
        return out

    @functools.wraps(stock_save)
    def save(*args, **named):
        _enter("saves")
        try:
            return stock_save(*args, **named)
        finally:
            _enter("steps")

    training.train_step, training.save_checkpoint_and_time = step, save


def _enter(phase):
    global _phase
    _phase = phase


def die(scratch, why: str) -> None:
    """SIGKILL to this process, after the phase that it is in was noted."""
    (scratch / KILLED).write_text(f"{_phase}: {why}")
    os.kill(os.getpid(), signal.SIGKILL)


def kill_after(scratch, victim: int, cpu_s: float) -> None:
    """SIGKILL once this rank has used so much processor time from here on: no busy machine moves that moment."""
    if rank() != victim:
        return
    end_s = time.process_time() + cpu_s

    def wait():
        while time.process_time() < end_s:
            time.sleep(0.001)
        die(scratch, f"after {cpu_s:.3f} s of processor time")

    threading.Thread(target=wait, daemon=True).start()


OPERATIONS = ("open", "os.rename", "os.mkdir", "os.rmdir", "os.remove", "os.truncate")


def kill_at_operation(scratch, root: Path, number: int = 1, what: str = ".*") -> None:
    """SIGKILL of rank 0 before the file operation of this number (from 1) on `root` while it saves, of those that
    match `what`: "os.rename of NAME"."""
    if rank() != 0:
        return
    process, seen = os.getpid(), [0]

    def hook(event, args):
        if (
            event in OPERATIONS
            and _phase == "saves"
            and isinstance(args[0], str | Path)
            and str(args[0]).startswith(str(root))
            and os.getpid() == process
        ):
            operation = f"{event} of {str(args[0])[len(str(root)) + 1 :]}"
            seen[0] += bool(re.fullmatch(what, operation))
            if seen[0] == number:
                die(scratch, f"before {operation}")

    sys.addaudithook(hook)


def at_step(scratch, step: int, victim: int, function, *args) -> None:
    """`function(*args)` on one rank before this step (from 1)."""
    from megatron.training import training

    stock = training.train_step

    @functools.wraps(stock)
    def train_step(*given, iteration, **named):
        if iteration + 1 == step and rank() == victim:
            function(*args)
        return stock(*given, iteration=iteration, **named)

    training.train_step = train_step


def before(scratch, where: tuple[str, str], calls: tuple[int, int], victim: int, function, *args) -> None:
    """`function(*args)` on one rank before these calls (from, to; counted from 1) of the function at
    (module or module:class, name)."""
    module, _, kind = where[0].partition(":")
    owner = importlib.import_module(module)
    owner = getattr(owner, kind) if kind else owner
    stock, called = getattr(owner, where[1]), [0]

    @functools.wraps(stock)
    def wrapped(*given, **named):
        called[0] += 1
        if rank() == victim and calls[0] <= called[0] <= calls[1]:
            function(*args)
        return stock(*given, **named)

    setattr(owner, where[1], wrapped)


def do(scratch, function, *args) -> None:
    """`function(*args)` on rank 0 before the run starts."""
    if rank() == 0:
        function(*args)


def signal_self(number: int) -> None:
    os.kill(os.getpid(), number)


def fill(folder: Path, leave_bytes: int = 0) -> None:
    """Leave no free byte on the file system of `folder`, or so many; nothing once it was emptied."""
    if _mended:
        return
    with (folder / BALLAST).open("ab", buffering=0) as file:
        for size in (1 << 16, 1 << 12, 1):
            try:
                while True:
                    file.write(bytes(size))
            except OSError as error:
                assert error.errno == errno.ENOSPC, error
        file.truncate(max(0, file.tell() - leave_bytes))


def empty(folder: Path) -> None:
    """Undo `fill`, for the rest of the run."""
    global _mended
    _mended = True
    (folder / BALLAST).unlink(missing_ok=True)


def bind_read_only(folder: Path) -> None:
    """What opens a path under `folder` from here on finds read-only storage; files that are open stay as they are."""
    subprocess.run(["mount", "--bind", folder, folder], check=True)
    subprocess.run(["mount", "-o", "remount,bind,ro", folder], check=True)


def kill_in_a_change(scratch, victim: int, number: int) -> None:
    """SIGKILL of this rank at the event of this number (from 1) of changes of plan: before a layer is staged, before
    the numbers of a weight are exchanged, and before and after a layer is switched."""
    from hmoe_megatron.replan import moves

    if rank() != victim:
        return
    seen = [0]

    def at(what):
        seen[0] += 1
        if seen[0] == number:
            _enter("changes of plan")
            die(scratch, what)

    def around(owner, name):
        stock = getattr(owner, name)

        @functools.wraps(stock)
        def call(*args, **named):
            at(f"before {name}")
            out = stock(*args, **named)
            if name == "switch":
                at("after switch")
            return out

        setattr(owner, name, call)

    around(moves._Stage, "__init__")
    around(moves._Stage, "switch")
    around(moves, "exchange")
