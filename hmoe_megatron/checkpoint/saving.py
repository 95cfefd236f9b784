"""Saving: a checkpoint is written aside and renamed when it is complete; a save that fails is reported, tried again and
counted.

Stands around Megatron's save_checkpoint, synchronous and asynchronous. Every step that may fail on one rank alone fails
on all of them (`together`), so that no rank waits for another that is gone.
"""

import contextlib
import functools
import io
import shutil
import traceback
from collections.abc import Callable
from pathlib import Path

from megatron.training import async_utils
from torch.distributed.checkpoint.api import CheckpointException

from hmoe_megatron import collectives
from hmoe_megatron.checkpoint import directory
from hmoe_megatron.checkpoint.manifest import MANIFEST_FILE, FileRecord, Manifest, record_files
from hmoe_megatron.exits import SavingFailed
from hmoe_megatron.files import sha256_file, sync
from hmoe_megatron.nan_guard.finite import not_finite

AS_IT_WAS = "the last checkpoint is as it was"
HASH_SUFFIX = ".sha256"
TRIES = 2  # of one save; a full disk does not empty itself while the ranks wait
WORKER = "Worker failure: An error is caught while starting worker 0, error: "  # Megatron's, before what matters
FAILURES = (CheckpointException, collectives.StepFailed)


def write_then_hash(write: Callable, rank: int, buckets: list, results, **named) -> None:
    """Megatron's writer of this rank's files, then the hash of each beside it: by who wrote them, and in the background
    where the writer is."""
    write(rank, buckets, results, **named)
    with contextlib.suppress(OSError):  # a failed write is in `results`; a file without a hash gets one on rank 0
        for path, *_ in buckets:
            Path(path + HASH_SUFFIX).write_text(sha256_file(path))


def write_or_raise(stock, *args, **named):
    """Megatron's write_preloaded_data: the error that it returns is raised, else Megatron tells only its class."""
    output = stock(*args, **named)
    if output is not None and isinstance(output[1], Exception):
        # The error and the frames that it left hold each other, and a buffer of a BytesIO: CPython 3.12.1 dies by
        # SIGSEGV when it collects such a cycle (bytesiobuf_releasebuffer).
        traceback.clear_frames(output[1].__traceback__)
        raise _first_cause(output[1])
    return output


def _first_cause(error: BaseException) -> BaseException:
    """The OSError that an error came of: torch's archive, closed on a full disk, hides it behind one of its own."""
    found = error
    while found is not None and not isinstance(found, OSError):
        found = found.__cause__ or found.__context__
    return found or error


def hashing_request(stock, *args, **named):
    """Megatron's async_save, whose request (also executed at once by a synchronous save) hashes what it writes."""
    request = stock(*args, **named)
    if request.async_fn is None:
        return request
    return request._replace(async_fn=functools.partial(write_then_hash, request.async_fn))


def finalize_together(stock, writer, metadata, wrapper):
    """Megatron's finalize, which writes `.metadata` on rank 0: if that fails there, it fails on every rank."""
    finish, failed = writer.finish, []

    def remembering(*args):
        try:
            finish(*args)
        except OSError as error:
            failed.append(f".metadata: {error.strerror}")

    writer.finish = remembering
    stock(writer, metadata, wrapper)
    collectives.all_ranks(lambda: _raise(failed))


def _raise(failed: list[str]) -> None:
    if failed:
        raise OSError(failed[0])


class Saver:
    """The saves of one run into `root`. manifest: (iteration, files) -> Manifest of this run's model. write_plan:
    writes the plan into a directory. max_failed: failed saves in a row that end the run."""

    def __init__(
        self, root: Path, manifest: Callable[[int, dict], Manifest], write_plan: Callable[[Path], None], max_failed: int
    ):
        self.root, self.manifest, self.write_plan, self.max_failed = root, manifest, write_plan, max_failed
        self.failed_in_a_row = 0
        self.last_error = ""
        self.config_error = ""  # why metadata.json of the save under way was not written
        self.tracked = None  # what the tracker said before the save that Megatron is about to note there
        self.writing: list[Path] = []  # checkpoints that are not in their place yet, oldest first

    def save_checkpoint(self, stock, iteration, model, *args, **named) -> None:
        """Megatron's save_checkpoint. Raises SavingFailed for weights that are not finite, and after `max_failed`
        failed saves in a row; else a failed save is reported and training goes on.

        Waits until the asynchronous save before it is in its place. Megatron would queue it, each with a copy of all
        state and none in the tracker, where steps are faster than the storage."""
        async_utils.maybe_finalize_async_save(blocking=True)
        bad = collectives.all_ranks(lambda: not_finite(model))
        if any(bad):
            rank, names = next((rank, names) for rank, names in enumerate(bad) if names)
            raise SavingFailed(
                f"iteration {iteration} is not saved: not finite on rank {rank}: {', '.join(names[:8])};"
                f" {AS_IT_WAS}: start again from it, with a lower --lr or other data"
            )
        for number in range(1, TRIES + 1):
            try:
                # Megatron makes the directory on rank 0 while the others go on.
                path = directory.checkpoint_path(self.root, iteration)
                collectives.run_on_rank0(lambda path=path: path.mkdir(parents=True, exist_ok=True))
                stock(iteration, model, *args, **named)
            except FAILURES as error:
                self.report(f"try {number} of {TRIES} to save iteration {iteration} failed", error)
            else:
                return
        self.count_failure()

    def report(self, what: str, error: BaseException) -> None:
        """Say on rank 0 that a save failed and why, and remove what it wrote: the next one may need the space."""
        self.last_error = _reason(error) + _free(self.root)
        failed = self.writing.pop(0) if self.writing else None
        if collectives.rank() == 0:
            print(f" {what}: {self.last_error}", flush=True)
            if failed:
                shutil.rmtree(directory.saving_path(failed), ignore_errors=True)

    def count_failure(self) -> None:
        """One more failed save in a row. Raises SavingFailed if that is one too many."""
        self.failed_in_a_row += 1
        if self.failed_in_a_row >= self.max_failed:
            raise SavingFailed(
                f"{self.failed_in_a_row} saves in a row failed (--hmoe-max-failed-saves "
                f"{self.max_failed}), the last one: {self.last_error}; {AS_IT_WAS}: fix that and start "
                "again from it"
            )
        if collectives.rank() == 0:
            print(
                f" not saved; training goes on ({self.failed_in_a_row} of --hmoe-max-failed-saves {self.max_failed} "
                "in a row)",
                flush=True,
            )

    def finalize(self, stock, *args, **named):
        """Megatron's maybe_finalize_async_save: an asynchronous save that failed is reported and counted."""
        while True:
            try:
                return stock(*args, **named)
            except FAILURES as error:
                self.report("an asynchronous save failed", error)
                self.count_failure()

    def end(self) -> None:
        """At the end of the run. Raises SavingFailed if the last save failed: the steps since are lost."""
        if self.failed_in_a_row:
            raise SavingFailed(
                f"the last save of the run failed: {self.last_error}; {AS_IT_WAS}: fix that and start again from it"
            )

    def write(self, stock, state, checkpoint_dir, *args, **named):
        """dist_checkpointing.save, aside; publishes the checkpoint when all of it is on the disk."""
        path = Path(checkpoint_dir)
        saving = directory.saving_path(path)

        collectives.run_on_rank0(lambda: directory.begin(path))
        self.writing.append(path)
        request = stock(state, str(saving), *args, **named)
        if request is None:
            self._publish(path)
        else:
            request.add_finalize_fn(lambda: self._publish(path))
        return request

    def write_config(self, stock, *args) -> None:
        """Megatron's save_config, which rank 0 does alone while the others wait: it fails when all ranks publish."""
        try:
            stock(*args)
        except OSError as error:
            self.config_error = error.strerror

    def _publish(self, path: Path) -> None:
        """Collect the hashes, write the manifest, put the directory in its place, name it in the tracker."""
        saving, iteration = directory.saving_path(path), int(path.name.removeprefix("iter_"))

        def publish():
            if failed := self.config_error:
                self.config_error = ""
                raise OSError(f"metadata.json: {failed}")
            for name in (".metadata", "metadata.json"):
                if not (saving / name).is_file() or not (saving / name).stat().st_size:
                    raise OSError(f"{name} was not written")
            self.write_plan(saving)
            self.manifest(iteration, _records(saving)).save(saving)
            sync(saving)
            directory.publish(path)
            self.tracked = directory.read_tracker(path.parent) or 0
            directory.write_tracker(path.parent, iteration)

        collectives.run_on_rank0(publish)
        self.writing.remove(path)
        self.failed_in_a_row = 0

    def open_tracker(self, stock, path, mode="r", *args, **named):
        """`open` for Megatron's save: the tracker is written already, whole, when Megatron opens it to truncate it."""
        if Path(path).name != directory.TRACKER_FILE or self.tracked is None:
            return stock(path, mode, *args, **named)
        if mode == "r":  # which checkpoint came before: --save-retain-interval may delete it
            return io.StringIO(str(self.tracked))
        self.tracked = None
        return io.StringIO()


def _records(saving: Path) -> dict[str, FileRecord]:
    """Record of every file; the hashes that writers left beside theirs are taken in and removed."""
    records = {}
    for mark in sorted(saving.glob(f"*{HASH_SUFFIX}")):
        name = mark.name.removesuffix(HASH_SUFFIX)
        records[name] = FileRecord((saving / name).stat().st_size, mark.read_text())
        mark.unlink()
    rest = [entry.name for entry in saving.iterdir() if entry.name not in records and entry.name != MANIFEST_FILE]
    return records | record_files(saving, rest)


def _free(root: Path) -> str:
    """How much room is left: Megatron's writers do not hand on why they failed."""
    with contextlib.suppress(OSError):
        return f" ({shutil.disk_usage(root).free / 1e6:.0f} MB free there)"
    return ""


def _reason(error: BaseException) -> str:
    """One line: of what several ranks say, each once."""
    if isinstance(error, CheckpointException):
        reasons = [
            f"rank {rank}: {str(failure[0]).splitlines()[-1].removeprefix(WORKER)}"
            for rank, failure in error.failures.items()
        ]
        return "; ".join(reasons[:8]) or "another rank failed to write its files"
    return str(error)
