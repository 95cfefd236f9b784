"""Rows of all items, printed and written as they come."""

import io
import tarfile
import threading
from pathlib import Path

from benchmarks.gpu import report
from hmoe_megatron.files import atomic_write


class Table:
    """rows: item -> its rows so far. notes: item -> why it is not whole. May be used from many threads."""

    def __init__(self, folder: Path):
        self.folder, self.machine, self.rows, self.notes = folder, {}, {}, {}
        self._wrong, self._lock = set(), threading.Lock()

    def add(self, item: str, row: dict) -> None:
        """A row that the page can't show becomes a note."""
        with self._lock:
            rows = self.rows.setdefault(item, [])
            try:
                line = report.line(item, row)
                report.TABLES[item]([*rows, row])
            except (KeyError, TypeError, ValueError, AttributeError) as error:
                self._note(item, f"a row of another form ({type(error).__name__}: {error})", True)
            else:
                rows.append(row)
                print(line, flush=True)
            self._write()

    def note(self, item: str, words: str, wrong: bool = False) -> None:
        """Why an item is not whole. wrong: it failed, as against being cut off."""
        with self._lock:
            self._note(item, words, wrong)
            self._write()

    def _note(self, item, words, wrong):
        self.rows.setdefault(item, [])
        self.notes[item] = f"{self.notes[item]}; {words}" if item in self.notes else words
        if wrong:
            self._wrong.add(item)
        print(f"{item:<12} NOT WHOLE: {words}"[:100], flush=True)

    def _write(self):
        report.write(self.folder, self.machine, self.rows, self.notes)

    def keep_logs(self, logs: Path) -> None:
        """Packs the logs so far into gpu_logs.tar.gz, beside the page."""
        data = io.BytesIO()
        with tarfile.open(fileobj=data, mode="w:gz") as packed:
            packed.add(logs, "gpu_logs")
        atomic_write(self.folder / "gpu_logs.tar.gz", data.getvalue())

    def wrong(self) -> list[str]:
        """Items in which something failed."""
        return sorted(
            self._wrong
            | {
                item
                for item, rows in self.rows.items()
                for row in rows
                if row.get("failed") or row.get("different in a second run") or row.get("ok") is False
            }
        )
