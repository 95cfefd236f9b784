"""make gpu: correctness, times, training steps and runs, and a hardware profile, on the machine at hand.

    python -m benchmarks.gpu [--seconds 300] [--only ITEM] [--output benchmarks]

For a machine with a GPU, torch and Triton, where megatron-core may lie in a folder of PYTHONPATH; installs nothing.
What is not there is named and skipped. Items come in the order of their value, each with its own limit; rows are
printed and written as they come, so that a run that is cut off still says something. Ends with gpu.json and gpu.md;
exit code 1 where something is wrong.
"""

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from benchmarks.gpu import report, runs, steps
from benchmarks.machine import ROOT

# Seconds of an item at most.
LIMITS = {"correctness": 75, "ffn": 90, "steps": 130, "runs": 100, "rates": 45, "sanitizer": 60}
RANDOM_CASES = 25  # of each kind: 200 in all
MACHINE = """
import json, os, platform, torch, triton
from benchmarks.machine import stamp
from hmoe_megatron.host import optional
kernels = optional.kernels()
gpu = torch.cuda.is_available()
card = f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}" if gpu else "no GPU"
engine = kernels.engine or kernels.no_engine
versions = f"Triton {triton.__version__}, CUDA {torch.version.cuda}, Transformer Engine {engine}"
print(json.dumps({"gpus": torch.cuda.device_count() if gpu else 0, "card": card, "engine": bool(kernels.engine),
                  "capability": torch.cuda.get_device_capability() if gpu else [0, 0],
                  "memory_bytes": torch.cuda.get_device_properties(0).total_memory if gpu else 0,
                  "stamp": f"{card}; {versions}; {stamp('torch')}"}))
"""


class Table:
    """Rows of all items: printed and written as they come."""

    def __init__(self, folder: Path):
        self.folder, self.machine, self.rows, self.notes = folder, {}, {}, {}
        self._lock = threading.Lock()

    def add(self, item: str, row: dict) -> None:
        with self._lock:
            self.rows.setdefault(item, []).append(row)
            print(report.line(item, row), flush=True)
            self._write()

    def note(self, item: str, words: str) -> None:
        """Why an item is not whole."""
        with self._lock:
            self.rows.setdefault(item, [])
            self.notes[item] = f"{self.notes[item]}; {words}" if item in self.notes else words
            print(f"{item:<12} NOT WHOLE: {words}"[:100], flush=True)
            self._write()

    def _write(self):
        report.write(self.folder, self.machine, self.rows, self.notes)

    def wrong(self) -> list[str]:
        """Items in which something failed."""
        return sorted({
            item for item, rows in self.rows.items() for row in rows
            if row.get("failed") or row.get("different in a second run") or row.get("ok") is False
        })  # fmt: skip


def in_processes(table: Table, item: str, commands: list[list[str]], limit_s: float, logs: Path) -> None:
    """The item's commands, all at a time; their rows as they come. What still runs after the limit is killed."""
    files = [logs / f"{item}_{number}.log" for number in range(len(commands))]
    processes = [
        subprocess.Popen([sys.executable, "-W", "ignore", "-m", *words], cwd=ROOT, text=True, stdout=subprocess.PIPE,
                         stderr=file.open("w"), start_new_session=True)
        for words, file in zip(commands, files, strict=True)
    ]  # fmt: skip

    def read(process):
        for line in process.stdout:
            with contextlib.suppress(json.JSONDecodeError):
                table.add(item, json.loads(line))

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
                table.note(item, f"exit code {code}: {tail[-1] if tail else ''}")
        reader.join(5)


def correctness(table: Table, limit_s: float, logs: Path, tiny: bool) -> None:
    module = "benchmarks.gpu.correctness"
    kinds = [] if tiny else [[module, "--random", str(RANDOM_CASES), "--kind", str(kind)] for kind in range(8)]
    in_processes(table, "correctness", [[module, *["--tiny"] * tiny], *kinds], limit_s, logs)


def ffn(table: Table, limit_s: float, logs: Path, tiny: bool) -> None:
    in_processes(table, "ffn", [["benchmarks.gpu.ffn", *["--tiny"] * tiny]], limit_s, logs)


def rates(table: Table, limit_s: float, logs: Path, tiny: bool) -> None:
    words = ["benchmarks.gpu.rates", "--output", str(table.folder / "gpu_profile.json")]
    in_processes(table, "rates", [[*words, *(["--tiny", "--seconds", "1"] if tiny else [])]], limit_s, logs)


def sanitizer(table: Table, limit_s: float, logs: Path, tiny: bool) -> None:
    in_processes(table, "sanitizer", [["benchmarks.gpu.correctness", "--sanitizer"]], limit_s, logs)


def step_item(table: Table, limit_s: float, logs: Path, tiny: bool) -> None:
    """In a thread, so that a side that hangs costs the limit and no more."""
    models = steps.TINY if tiny else steps.MODELS
    work = threading.Thread(target=steps.compare_all, daemon=True, args=(
        table.machine.get("engine", False), models, logs, lambda **row: table.add("steps", row), tiny))  # fmt: skip
    work.start()
    work.join(limit_s)
    if work.is_alive():
        table.note("steps", f"cut off after {limit_s:.0f} s")


def run_item(table: Table, limit_s: float, logs: Path, tiny: bool) -> None:
    """One process for each number of ranks; the runs in turn."""
    until = time.monotonic() + limit_s
    gpus, capability = table.machine.get("gpus", 0), tuple(table.machine.get("capability", (0, 0)))
    chosen = runs.RUNS if not tiny else [run for run in runs.RUNS if run.name in ("no flag", "the same twice")]
    for ranks in sorted({run.gpus for run in chosen}):
        of = [run for run in chosen if run.gpus == ranks]
        why = {run.name: runs.lacking(run, 1 if tiny else gpus, capability) for run in of}
        for run in (run for run in of if why[run.name]):
            table.add("runs", {"run": run.name, "skipped": why[run.name]})
        work = threading.Thread(target=_serve_runs, daemon=True, args=(
            table, ranks, [run for run in of if not why[run.name]], logs))  # fmt: skip
        work.start()
        work.join(max(0.1, until - time.monotonic()))
        if work.is_alive():
            table.note("runs", f"on {ranks} GPU cut off after {limit_s:.0f} s")


def _serve_runs(table, ranks, of, logs):
    from benchmarks.duel import Side

    waiting = list(of)
    while waiting:
        try:
            log = logs / f"runs_{ranks}.log"
            with Side(f"runs on {ranks}", "serve", "", log, ranks, "benchmarks.gpu.runs") as side:
                side.ready()
                while waiting:
                    run = waiting.pop(0)
                    found = side.ask("run", flags=run.flags, resume=run.resume)
                    # Of the very same flags the second run is a run of its own.
                    again = {"again": True} if run.against == run.flags else {}
                    against = None if run.against is None else side.ask("run", flags=run.against, **again)
                    table.add("runs", {"run": run.name, **runs.verdict(run, found, against)})
        except RuntimeError as error:  # the process died: the run fails, the others go on in a new one
            table.add("runs", {"run": run.name, "ok": False, "failed": str(error).strip().splitlines()[-1]})


ITEMS = {"correctness": correctness, "ffn": ffn, "steps": step_item, "runs": run_item, "rates": rates,
         "sanitizer": sanitizer}  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=300, help="for everything; default: 300")
    parser.add_argument("--only", action="append", choices=ITEMS, help="of the items these")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks", help="folder of gpu.json and gpu.md")
    parser.add_argument("--tiny", action="store_true", help="small shapes on a CPU, for the tests")
    given = parser.parse_args(argv)
    began, table = time.monotonic(), Table(given.output)
    environment = {"PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))}
    os.environ.update(environment | ({"TRITON_INTERPRET": "1"} if given.tiny else {}))
    asked = subprocess.run([sys.executable, "-W", "ignore", "-c", MACHINE], cwd=ROOT, capture_output=True, text=True)
    if asked.returncode:
        print(f"make gpu: {asked.stderr.strip().splitlines()[-1]}", file=sys.stderr)
        return 1
    table.machine = json.loads(asked.stdout.splitlines()[-1])
    print(table.machine["stamp"], flush=True)
    if not (table.machine["gpus"] or given.tiny):
        print("make gpu: torch finds no GPU on this machine (make doctor says why)", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory(prefix="make-gpu-") as logs:
        for item in given.only or ITEMS:
            left = given.seconds - (time.monotonic() - began)
            if left < 10:
                table.note(item, "no time left")
                continue
            started = time.monotonic()
            ITEMS[item](table, min(LIMITS[item], left), Path(logs), given.tiny)
            print(f"{item:<12} {time.monotonic() - started:.0f} s", flush=True)
    print(report.page(table.machine, table.rows, table.notes))
    wrong = table.wrong()
    print(f"{given.output / 'gpu.md'}: written in {time.monotonic() - began:.0f} s; "
          f"{'wrong: ' + ', '.join(wrong) if wrong else 'nothing is wrong'}")  # fmt: skip
    return int(bool(wrong))


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    os._exit(code)  # a side that hangs must not keep the command
