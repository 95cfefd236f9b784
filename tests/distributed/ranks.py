"""`run_ranks`: run a function on several gloo ranks from an ordinary pytest function.

    def gather(offset):                       # at module level: ranks import it by name
        ...
        return torch.distributed.get_rank() + offset

    def test_gather():
        assert run_ranks(2, gather, 10) == [10, 11]

Ranks are forked from a server that has torch and Megatron imported (`preloaded`), so that a rank starts in
well under a second. They meet through a file, not a port.
"""

import contextlib
import faulthandler
import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path

GRACE_S = 2.0  # for the other ranks after one failed or the time was up
ALONE_S = 5.0  # until ranks that outlive a failed one are told to end; torchrun's 0.1 s would hide that they hang
# For what a rank started: a data loader's worker looks for its parent every 5 s; a process that is to write checkpoints
# imports torch and Megatron before it looks, which takes half a minute on a busy machine.
ORPHAN_S = 90.0
LOG_TAIL_LINES = 60


def run_alone(function, *args, timeout_s=60.0, **kwargs):
    """function(*args, **kwargs) in a process that is no rank: it may set torch.distributed up by itself."""
    with _started(None, (function, args, kwargs), timeout_s) as (processes, folder):
        _wait(processes, timeout_s)
        _raise_first_error(folder, processes, timeout_s)
        return _read(folder / "0.result")


def run_ranks(world_size, function, *args, timeout_s=60.0, **kwargs):
    """Return [function(*args, **kwargs) on rank 0, on rank 1, ...].

    `function` is a module-level function; it, its arguments and its results must pickle. torch.distributed is
    initialised with gloo, the host is applied, RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE are set and
    the environment is the caller's. The exception of the rank that failed first is raised here, its traceback
    and the end of its output in the notes; the other ranks are killed. TimeoutError after `timeout_s`, with
    the stack of every rank that was still running.
    """
    with _started(world_size, (function, args, kwargs), timeout_s) as (ranks, folder):
        _wait(ranks, timeout_s)
        _raise_first_error(folder, ranks, timeout_s)
        return [_read(folder / f"{rank}.result") for rank in range(world_size)]


@contextlib.contextmanager
def _started(world_size, call, timeout_s):
    """(ranks that run call = (function, args, kwargs), folder of what they leave); at the end they are killed."""
    call = pickle.dumps(call)
    with tempfile.TemporaryDirectory(prefix="ranks-") as folder:
        context = _context()
        shared = world_size, folder, call, dict(os.environ), timeout_s
        ranks = [context.Process(target=_rank, args=(rank, *shared)) for rank in range(world_size or 1)]
        try:
            for rank in ranks:
                rank.start()
            yield ranks, Path(folder)
        finally:
            for rank in ranks:
                _kill(rank)


@dataclass(frozen=True)
class RankEnd:
    """How a rank ended. exit_code: negative for a signal, None if it hung; told: it ended only when it got SIGTERM, as
    torchrun sends it after another rank failed; orphans: processes that it left."""

    exit_code: int | None
    told: bool
    output: str
    orphans: tuple[int, ...]


def end_ranks(world_size, function, *args, timeout_s=60.0, **kwargs):
    """[RankEnd of rank 0, of rank 1, ...]: as `run_ranks` for ranks that end by themselves, die or are killed."""
    with _started(world_size, (function, args, kwargs), timeout_s) as (ranks, folder):
        _wait(ranks, timeout_s, ALONE_S)
        told = [rank for rank in ranks if rank.exitcode is None]
        for rank in told:
            rank.terminate()
        _wait(told, 0.0)
        ends = []
        for number, rank in enumerate(ranks):
            code, orphans = rank.exitcode, _orphans(rank.pid)
            output = (folder / f"{number}.log").read_text(errors="replace")
            hung = code is None or "Timeout (" in output
            ends.append(RankEnd(None if hung else code, rank in told, output, orphans))
        return ends


def _orphans(group):
    """Processes of a group that are there ORPHAN_S after their leader."""
    deadline = time.monotonic() + ORPHAN_S
    while (left := _members(group)) and time.monotonic() < deadline:
        time.sleep(0.1)
    return tuple(left)


def _members(group):
    found = []
    for entry in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _, its_group = entry.read_text().rsplit(")", 1)[1].split()[:3]
            if int(its_group) == group and state not in "ZX":
                found.append(int(entry.parent.name))
    return found


def forked(function, *args):
    """A started process that has torch and Megatron imported; its body is function(*args), its streams are ours."""
    process = _context().Process(target=function, args=args)
    process.start()
    return process


def _context():
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([f"{__package__}.preloaded"])
    # The server does not take over sys.path before Python 3.12.5.
    ours = {"PYTHONPATH": os.pathsep.join(sys.path), "TORCH_CPP_LOG_LEVEL": "ERROR"}  # a peer that left is no warning
    before = dict(os.environ)
    os.environ.update(ours)
    try:
        multiprocessing.forkserver.ensure_running()
    finally:
        os.environ.clear()
        os.environ.update(before)
    return context


def _wait(ranks, timeout_s, grace_s=GRACE_S):
    """Until all ended, or `grace_s` after the first failed, or GRACE_S after the time was up."""
    deadline = time.monotonic() + timeout_s + GRACE_S
    running = list(ranks)
    while running and (left_s := deadline - time.monotonic()) > 0:
        wait([rank.sentinel for rank in running], timeout=left_s)
        if any(rank.exitcode for rank in running):
            deadline = min(deadline, time.monotonic() + grace_s)
        running = [rank for rank in running if rank.exitcode is None]


def _raise_first_error(folder, ranks, timeout_s):
    errors = [_read(file) for file in folder.glob("*.error")]
    if errors:
        _, number, error = min(errors, key=lambda item: item[0])
        error.add_note(f"output of rank {number}:\n{_log(folder, number)}")
        raise error
    failed = [number for number, rank in enumerate(ranks) if rank.exitcode != 0]
    if failed:
        logs = "\n".join(
            f"rank {number}, exit code {ranks[number].exitcode}:\n{_log(folder, number)}" for number in failed
        )
        if any("Timeout (" in _log(folder, number) or ranks[number].exitcode is None for number in failed):
            raise TimeoutError(f"ranks {failed} still ran after {timeout_s} s\n{logs}")
        raise RuntimeError(f"ranks {failed} died\n{logs}")


def _log(folder, number):
    file = folder / f"{number}.log"
    return "\n".join(file.read_text(errors="replace").splitlines()[-LOG_TAIL_LINES:]) if file.exists() else ""


def _kill(rank):
    """Kill a rank and what it started (it leads a process group of its own)."""
    if rank.pid is None:
        return
    with contextlib.suppress(ProcessLookupError):
        os.killpg(rank.pid, signal.SIGKILL)
    if rank.exitcode is None:
        rank.kill()
    rank.join()


def _rank(rank, world_size, folder, call, environment, timeout_s):
    """Body of one rank. Ends the process by itself after `timeout_s`, also when the test process is gone."""
    os.setpgid(0, 0)
    folder = Path(folder)
    log = os.open(folder / f"{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    faulthandler.dump_traceback_later(timeout_s, exit=True)
    os.environ.clear()
    os.environ.update(environment, CUDA_VISIBLE_DEVICES="", OMP_NUM_THREADS="1", TRITON_INTERPRET="1")
    if world_size:
        places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
        os.environ.update({name: str(value) for name, value in places.items()})
    try:
        import torch.distributed

        from hmoe_megatron import machine

        from . import preloaded  # noqa: F401

        machine.prepare_environment()
        if world_size:
            torch.distributed.init_process_group(
                "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world_size
            )
        function, args, kwargs = pickle.loads(call)
        _write(folder / f"{rank}.result", function(*args, **kwargs))
        # No rank takes its connections away while another still talks to it.
        if world_size:
            torch.distributed.barrier()
    except BaseException as error:
        raised_at_s = time.time()
        error.add_note(f"on rank {rank} of {world_size}:\n{traceback.format_exc()}")
        try:
            pickle.loads(pickle.dumps(error))
        except Exception:
            notes = error.__notes__
            error = RuntimeError(f"{type(error).__name__}: {error}")
            error.__notes__ = notes
        _write(folder / f"{rank}.error", (raised_at_s, rank, error))
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def _write(file, value):
    import torch

    temporary = file.with_suffix(".part")
    torch.save(value, temporary)
    os.replace(temporary, file)


def _read(file):
    """What our own rank wrote. Not by pickle alone: a tensor that Megatron's process pickled imports Megatron
    here."""
    import torch

    return torch.load(file, weights_only=False)
