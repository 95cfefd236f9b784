"""telemetry.jsonl of a run, and its like, as they are written. reader.py reads it."""

import errno
import json
import os
from pathlib import Path

from hmoe_megatron.files import TELEMETRY_FILE, atomic_write


class TelemetryFile:
    """Append-only JSON lines of one run. A resumed run first drops the steps it is about to do again.

    A disk that is full or read-only costs records, not the run; it is said once.
    """

    def __init__(self, directory: Path, name: str = TELEMETRY_FILE):
        self.path = Path(directory) / name
        self._file = None
        self._first = None  # iteration of the first record of this run
        self._told = False

    def write(self, record: dict) -> None:
        """Append one record and hand it to the system at once, so that a killed run keeps it."""
        self._first = self._first or record["iteration"]
        try:
            if self._file is None:
                self._drop_from(self._first)
                self._file = self.path.open("ab", buffering=0)
            self._append((json.dumps(record, allow_nan=False) + "\n").encode())
        except OSError as error:
            if not self._told:
                print(f" {self.path}: {error.strerror}: records are lost, training goes on", flush=True)
                self._told = True

    def _append(self, line: bytes) -> None:
        """All of the line or nothing. Raises OSError."""
        end = os.fstat(self._file.fileno()).st_size
        written = self._file.write(line)
        if written < len(line):
            self._file.truncate(end)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def _drop_from(self, iteration: int) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if not self.path.exists():
            return
        kept = []
        for line in self.path.read_text(encoding="utf-8").splitlines():
            try:
                if json.loads(line)["iteration"] < iteration:
                    kept.append(line + "\n")
            except (ValueError, KeyError, TypeError):
                continue  # the last line of a killed run may be cut off
        atomic_write(self.path, "".join(kept).encode())
