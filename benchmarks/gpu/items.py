"""The items of `make gpu` in the order of their value: which processes do one, and what ends it in time."""

import contextlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.duel import Side
from benchmarks.gpu import runs, steps
from benchmarks.gpu.correctness import KINDS, NAMES
from benchmarks.gpu.table import Table
from benchmarks.machine import ROOT

RANDOM_CASES = 25  # of each kind: 200 in all
LAST_S = 8.0  # what a process that stops by itself may need after its last case
RUN_S = 90.0  # of a training run at most: a rank that died leaves the others waiting


@dataclass
class Session:
    """What the items share. ``sides`` and ``servers`` are started first and import while other items run."""

    table: Table
    logs: Path
    tiny: bool = False
    sides: dict[str, dict[str, Side]] = field(default_factory=dict)  # of steps.start
    servers: dict[int, Side] = field(default_factory=dict)  # by ranks

    @property
    def gpus(self) -> int:
        return 1 if self.tiny else self.table.machine["gpus"]

    def start(self, items) -> None:
        """Starts what takes long to import."""
        engine = self.table.machine["engine"]
        if "steps" in items:
            self.sides = steps.start(engine, steps.TINY if self.tiny else steps.MODELS, self.logs)
        if "runs" in items:
            self.servers = {ranks: self.server(ranks) for ranks in (1, 2) if ranks <= self.gpus}

    def server(self, ranks: int) -> Side:
        return Side(f"runs on {ranks}", "serve", "", self.logs / f"runs_{ranks}.log", ranks, "benchmarks.gpu.runs")

    def end_of(self, item: str) -> None:
        """Ends the processes that the item asks."""
        of = {"steps": [side for of in self.sides.values() for side in of.values()], "runs": self.servers.values()}
        for side in of.get(item, ()):
            side.__exit__()


def correctness(session: Session, limit_s: float) -> None:
    module = "benchmarks.gpu.correctness"
    until = ["--until", f"{time.time() + limit_s - LAST_S:.0f}"]
    commands = (
        [[module, "--tiny"]]
        if session.tiny
        else [
            *([module, "--dtype", name] for name in NAMES),
            [module, "--graph"],
            *([module, "--random", str(RANDOM_CASES), "--kind", str(kind)] for kind in range(KINDS)),
            [module, "--sanitizer"],
        ]
    )
    in_processes(session, "correctness", [[*command, *until] for command in commands], limit_s)


def ffn(session: Session, limit_s: float) -> None:
    in_processes(session, "ffn", [["benchmarks.gpu.ffn", *["--tiny"] * session.tiny]], limit_s)


def rates(session: Session, limit_s: float) -> None:
    words = ["benchmarks.gpu.rates", "--output", str(session.table.folder / "gpu_profile.json")]
    in_processes(session, "rates", [[*words, *(["--tiny", "--seconds", "1"] if session.tiny else [])]], limit_s)


def training_steps(session: Session, limit_s: float) -> None:
    def work(emit, stopped):
        for model, of in session.sides.items():
            if not stopped.is_set():
                steps.compare_or_say(model, of, emit, session.tiny)

    in_thread(session, "steps", work, limit_s)


def training_runs(session: Session, limit_s: float) -> None:
    """The runs of one GPU, then those of two, each in one process for as many ranks."""
    machine = session.table.machine
    chosen = [run for run in runs.RUNS if not session.tiny or run.name in ("no flag", "the same twice")]

    def work(emit, stopped):
        for ranks in sorted({run.gpus for run in chosen}):
            of = [run for run in chosen if run.gpus == ranks]
            why = {run: runs.lacking(run, session.gpus, tuple(machine["capability"]), machine["engine"]) for run in of}
            for run in (run for run in of if why[run]):
                emit(run=run.name, skipped=why[run])
            for run in (run for run in of if not why[run]):
                if not stopped.is_set():
                    emit(run=run.name, **one_run(session, run, stopped))

    in_thread(session, "runs", work, limit_s)


def one_run(session: Session, run: runs.Run, stopped: threading.Event) -> dict:
    """Its verdict. Where the process dies or hangs, the run has failed and the next gets a new process."""
    side = session.servers[run.gpus]
    watch = threading.Timer(RUN_S, side.__exit__)
    try:
        side.ready()
        watch.start()
        found = side.ask("run", flags=run.flags, resume=run.resume)
        # Of the very same flags the second run is a run of its own.
        again = {"again": True} if run.against == run.flags else {}
        against = None if run.against is None else side.ask("run", flags=run.against, **again)
        return runs.verdict(run, found, against)
    except RuntimeError as error:
        side.__exit__()
        if not stopped.is_set():
            session.servers[run.gpus] = session.server(run.gpus)
        return {"ok": False, "failed": str(error).strip().splitlines()[-1]}
    finally:
        watch.cancel()


def in_processes(session: Session, item: str, commands: list[list[str]], limit_s: float) -> None:
    """The item's commands, all at a time; their rows as they come. What still runs after the limit is killed."""
    table = session.table
    files = [session.logs / f"{item}_{number}.log" for number in range(len(commands))]
    processes = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", *words],
            cwd=ROOT,
            text=True,
            errors="replace",
            stdout=subprocess.PIPE,
            stderr=file.open("w"),
            start_new_session=True,
        )
        for words, file in zip(commands, files, strict=True)
    ]

    def read(process):
        for line in process.stdout:
            with contextlib.suppress(json.JSONDecodeError):
                if isinstance(row := json.loads(line), dict):
                    table.add(item, row)

    readers = [threading.Thread(target=read, args=(process,), daemon=True) for process in processes]
    for reader in readers:
        reader.start()
    until = time.monotonic() + limit_s
    for process, reader, file in zip(processes, readers, files, strict=True):
        try:
            code = process.wait(max(0.1, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, 9)
            process.wait()
            table.note(item, f"cut off after {limit_s:.0f} s")
        else:
            if code:
                tail = file.read_text(errors="replace").strip().splitlines()
                table.note(item, f"exit code {code}: {tail[-1] if tail else ''}", wrong=True)
        reader.join(5)


def in_thread(session: Session, item: str, work: Callable, limit_s: float) -> None:
    """work(emit, stopped) in a thread of its own: a side that hangs costs the limit and no more. After the limit the
    sides that it may wait for are ended, and what it still emits is dropped."""
    stopped = threading.Event()

    def emit(**row):
        if not stopped.is_set():
            session.table.add(item, row)

    def watched():
        try:
            work(emit, stopped)
        except Exception as error:
            if not stopped.is_set():
                session.table.note(item, f"{type(error).__name__}: {error}", wrong=True)

    thread = threading.Thread(target=watched, daemon=True)
    thread.start()
    thread.join(limit_s)
    if thread.is_alive():
        stopped.set()
        session.table.note(item, f"cut off after {limit_s:.0f} s")
        session.end_of(item)
        thread.join(10)


ITEMS = {"correctness": correctness, "ffn": ffn, "steps": training_steps, "runs": training_runs, "rates": rates}
# An item's share of the time; what one leaves goes to those after it.
WEIGHTS = {"correctness": 75, "ffn": 75, "steps": 90, "runs": 90, "rates": 30}


def do(session: Session, items: list[str], seconds: float) -> None:
    """The items, each with its share of the time that is left."""
    until = time.monotonic() + seconds
    try:
        session.start(items)
        for number, item in enumerate(items):
            left, started = until - time.monotonic(), time.monotonic()
            if left < LAST_S:
                session.table.note(item, "no time left")
                continue
            ITEMS[item](session, left * WEIGHTS[item] / sum(WEIGHTS[other] for other in items[number:]))
            session.end_of(item)
            print(f"{item:<12} {time.monotonic() - started:.0f} s", flush=True)
            session.table.keep_logs(session.logs)
    finally:
        for item in ITEMS:
            session.end_of(item)
