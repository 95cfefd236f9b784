"""Two or more models, each in processes of its own, timed in turns: whatever the machine does meanwhile hits all."""

import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

from benchmarks.machine import ROOT
from hmoe_megatron.launch.nodes import reserved_port


class Side:
    """Processes of benchmarks/worker.py with one model: ``ask`` for what it does. A context manager: it ends them."""

    def __init__(self, name: str, kind: str, flags: str, log: Path, ranks: int = 1, module="benchmarks.worker"):
        self.name, self.log, self._ready = name, log, None
        self._held = reserved_port()
        port = self._held.getsockname()[1]
        self._processes = []
        with log.open("w") as file:
            for rank in range(ranks):
                environment = os.environ | {
                    "RANK": str(rank),
                    "LOCAL_RANK": str(rank),
                    "WORLD_SIZE": str(ranks),
                    "MASTER_ADDR": "127.0.0.1",
                    "LOCAL_WORLD_SIZE": str(ranks),
                    "MASTER_PORT": str(port),
                    "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))),
                }
                command = [sys.executable, "-W", "ignore", "-m", module, kind, *flags.split()]
                pipes = (
                    {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
                    if rank == 0
                    else {"stdin": subprocess.DEVNULL, "stdout": file}
                )
                self._processes.append(
                    subprocess.Popen(command, cwd=ROOT, env=environment, stderr=file, text=True, **pipes)
                )
        self.first = self._processes[0]

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for process in self._processes:
            process.kill()
            process.wait()
        self._held.close()

    def ready(self) -> dict:
        """Waits until all is imported: {"ready_s"}, seconds since the process began."""
        self._ready = self._ready or self._answer()
        return self._ready

    def ask(self, what: str, **how) -> dict:
        """Have it done, and wait. RuntimeError with the end of the log where it fails."""
        try:
            self.first.stdin.write(json.dumps({"do": what, **how}) + "\n")
            self.first.stdin.flush()
        except (OSError, ValueError) as error:  # it has ended
            raise self._failed() from error
        return self._answer()

    def _answer(self) -> dict:
        try:
            return json.loads(self.first.stdout.readline())
        except (OSError, ValueError) as error:  # no line, or half of one
            raise self._failed() from error

    def _failed(self) -> RuntimeError:
        tail = "".join(self.log.read_text(errors="replace").splitlines(keepends=True)[-20:])
        return RuntimeError(f"{self.name} ended:\n{tail}")


def alternate(asks: dict, rounds: int) -> dict[str, list[float]]:
    """Median milliseconds of each round, by name. asks: name -> function that returns the times of some calls.

    The order turns round with every round: a machine that slows down favours none.
    """
    medians = {name: [] for name in asks}
    for number in range(rounds):
        for name in list(asks)[:: 1 if number % 2 == 0 else -1]:
            medians[name].append(statistics.median(asks[name]()))
    return medians


def ratio(medians: dict[str, list[float]], name: str, to: str) -> tuple[float, float, float]:
    """(median, least, most) over the rounds of one's time over the other's."""
    ratios = [a / b for a, b in zip(medians[name], medians[to], strict=True)]
    return statistics.median(ratios), min(ratios), max(ratios)
