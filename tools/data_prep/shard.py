"""The work of one process: documents are appended in a hidden folder beside the output, and committed now and then.

What was committed lasts: after any end of the process the folder is cut back to it and the work goes on from there.
"""

import contextlib
import fcntl
import json
import os
import shutil
import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path

from hmoe_megatron.files import atomic_write
from hmoe_megatron.tools.data_prep.encoding import Encoded

COMMIT_S = 10.0
STATE, QUARANTINE = "state.json", "quarantine.jsonl"


@dataclass
class Progress:
    """What is committed. span, offset: the next record is there (None: at the span's start); line: how many the span
    had before; tokens: a key; bytes: of each file; tokenizer: what the sidecar says of it."""

    span: int = 0
    offset: int | None = None
    line: int = 0
    records: int = 0
    documents: int = 0
    tokens: list[int] = field(default_factory=list)
    bad: dict[str, int] = field(default_factory=dict)
    bytes: dict[str, int] = field(default_factory=dict)
    tokenizer: dict = field(default_factory=dict)
    is_done: bool = False


def folder_of(prefix: str | Path, shard: int = 0, shards: int = 1) -> Path:
    prefix = Path(prefix)
    return prefix.with_name(f".{prefix.name}.partial" + (f"-{shard}-of-{shards}" if shards > 1 else ""))


def _locked(folder: Path) -> int:
    """A lock on the folder, which is made if it is not there. Raises ValueError if another run has it."""
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(lock), os.stat(folder)):
                return lock
        except FileNotFoundError:  # that run had just published, and removed it
            pass
        except BlockingIOError:
            os.close(lock)
            raise ValueError(
                f"--output-prefix: another run is writing {folder}; wait for it or choose another prefix"
            ) from None
        os.close(lock)


class Shard:
    """The folder, open and locked. request: what decides the output's bytes; policy: what becomes of bad records."""

    def __init__(self, folder: Path, keys: int, request: dict, policy: str):
        """Takes up what is committed there. Raises ValueError if another run holds it or had another request."""
        self.folder, self.request, self.policy = folder, request, policy
        self.lock = _locked(folder)
        self.files, self.committed_s = {}, time.monotonic()
        names = [name for key in range(keys) for name in (f"{key}.bin", f"{key}.lengths")] + [QUARANTINE]
        try:
            self.progress = self._take_up(names) or Progress(tokens=[0] * keys, bytes=dict.fromkeys(names, 0))
            if not self.progress.is_done:
                self.files = {name: self._open(name) for name in names}
        except BaseException:
            self.close()
            raise
        self.bad = Counter(self.progress.bad)
        self.documents_before, self.tokens_before = self.progress.documents, sum(self.progress.tokens)

    def _take_up(self, names: list[str]) -> Progress | None:
        try:
            state = json.loads((self.folder / STATE).read_text())
            request, policy, progress = state["request"], state["policy"], Progress(**state["progress"])
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise ValueError(
                f"{self.folder / STATE}: damaged ({error}); remove the folder {self.folder} to start again"
            ) from error
        remedy = f"give that command's flags to go on, or remove the folder {self.folder} to start again"
        changed = sorted(name for name in {*request, *self.request} if request.get(name) != self.request.get(name))
        if changed:
            raise ValueError(
                f"--output-prefix: {self.folder} holds the work of another command, of other "
                f"{', '.join(changed)}; {remedy}"
            )
        if progress.bad and policy != self.policy:
            raise ValueError(
                f"--on-bad-record {self.policy}: {self.folder} was begun with {policy} and has bad records"
                f" already; {remedy}"
            )
        for name in names:
            path = self.folder / name
            if progress.is_done:
                continue
            if not path.is_file() or path.stat().st_size < progress.bytes[name]:
                raise ValueError(f"{path}: shorter than what was committed; {remedy}")
        return progress

    def _open(self, name: str):
        if not self.progress.bytes[name]:
            # Not cut to nothing: of a run that was killed while it removed this folder, it may be the output's own.
            (self.folder / name).unlink(missing_ok=True)
        file = open(self.folder / name, "ab")  # noqa: SIM115  closed by close()
        file.truncate(self.progress.bytes[name])
        file.seek(0, os.SEEK_END)  # truncating leaves it where the file ended before
        return file

    @property
    def is_resumed(self) -> bool:
        return self.progress.records > 0 or self.progress.is_done

    def enter(self, span: int) -> None:
        """The next block is of this span."""
        if span != self.progress.span:
            self.progress.span, self.progress.offset, self.progress.line = span, None, 0

    def add(self, encoded: Encoded, quarantine: list[dict], offset: int) -> None:
        """The documents of a block that ends at `offset`, and its bad records that are kept; commits now and then."""
        progress = self.progress
        for key, (ids, lengths) in enumerate(zip(encoded.ids, encoded.lengths, strict=True)):
            self.files[f"{key}.bin"].write(ids.data)
            self.files[f"{key}.lengths"].write(lengths.data)
            progress.tokens[key] += len(ids)
        self.files[QUARANTINE].write("".join(json.dumps(line) + "\n" for line in quarantine).encode("ascii"))
        self.bad.update(bad.reason for bad in encoded.bad)
        progress.documents += len(encoded.lengths[0])
        progress.records += len(encoded.lengths[0]) + len(encoded.bad)
        progress.line += encoded.lines
        progress.offset = offset
        if time.monotonic() - self.committed_s >= COMMIT_S:
            self.commit()

    def commit(self, is_done: bool = False) -> None:
        for file in self.files.values():
            file.flush()
            os.fsync(file.fileno())
        self.progress.bytes = {name: file.tell() for name, file in self.files.items()}
        self.progress.bad, self.progress.is_done = dict(sorted(self.bad.items())), is_done
        state = {"request": self.request, "policy": self.policy, "progress": asdict(self.progress)}
        atomic_write(self.folder / STATE, json.dumps(state).encode())
        self.committed_s = time.monotonic()

    def close(self) -> None:
        """Leaves the folder as it is."""
        for file in self.files.values():
            with contextlib.suppress(OSError):  # the disk may be full; what was not committed is lost anyway
                file.close()
        if self.lock is not None:
            os.close(self.lock)
            self.lock = None

    def remove(self) -> None:
        shutil.rmtree(self.folder)
        self.close()
