"""Loading: files are checked before anything in them is believed, and what was checked is what is loaded."""

import pickle
import time
import traceback
from collections.abc import Callable
from pathlib import Path

from megatron.core.dist_checkpointing.core import CheckpointingException
from torch.distributed.checkpoint.api import CheckpointException

from hmoe_megatron import collectives
from hmoe_megatron.checkpoint import manifest
from hmoe_megatron.checkpoint.reader import read_metadata, refused_pickle
from hmoe_megatron.exits import OTHER_CHECKPOINT, CheckpointRefused, RunEnded
from hmoe_megatron.nan_guard.finite import not_finite

# Their message is enough; of others the traceback is printed too.
EXPECTED = (AssertionError, CheckpointException, CheckpointingException, OSError, pickle.UnpicklingError, ValueError)


def load_checkpoint(stock: Callable, path: Path, skip_integrity: bool, models, *args, **named):
    """Megatron's load_checkpoint of the checkpoint in `path`, which its arguments name already.

    Raises CheckpointRefused on every rank for damage; on the rank that met it for what only reading shows.
    """
    check_files(path, skip_integrity)
    try:
        loaded = stock(models, *args, **named)
    except RunEnded:
        raise
    except (Exception, CheckpointException, SystemExit) as error:
        raise _refused(path, error) from None
    bad = collectives.all_ranks(lambda: not_finite(models))
    if any(bad):
        rank, names = next((rank, names) for rank, names in enumerate(bad) if names)
        raise CheckpointRefused(f"{path}: not finite on rank {rank}: {', '.join(names[:8])}: {OTHER_CHECKPOINT}")
    return loaded


def check_files(path: Path, skip_integrity: bool) -> None:
    """Compare size and SHA-256 of every file with the manifest, each rank a share, and `.metadata` with what it may be.

    Prints how long it took. Raises CheckpointRefused on every rank; nothing has been unpickled then.
    """
    if not skip_integrity:
        started_s = time.monotonic()
        try:
            files = collectives.run_on_rank0(lambda: manifest.load_manifest(path).files)
            share = manifest.share_of(files, collectives.rank(), collectives.world_size())
            damages = sum(collectives.all_ranks(lambda: manifest.damaged_files(path, share)), [])
            damages += collectives.run_on_rank0(lambda: manifest.unlisted_files(path, files))
        except collectives.StepFailed as error:
            raise CheckpointRefused(str(error).removeprefix("rank 0: CheckpointRefused: ")) from None
        if damages:
            more = f" and {len(damages) - manifest.MAX_DAMAGES} more" if len(damages) > manifest.MAX_DAMAGES else ""
            raise CheckpointRefused(
                f"{path} is damaged: {'; '.join(damages[: manifest.MAX_DAMAGES])}{more}: "
                f"{OTHER_CHECKPOINT}, or load it as it is with --hmoe-skip-integrity"
            )
        if collectives.rank() == 0:
            size_mb = sum(record.bytes for record in files.values()) / 1e6
            print(
                f" {path}: SHA-256 of {len(files)} files, {size_mb:.1f} MB, checked in "
                f"{time.monotonic() - started_s:.2f} s",
                flush=True,
            )
    try:
        collectives.run_on_rank0(lambda: read_metadata(path) and None)
    except collectives.StepFailed as error:
        raise CheckpointRefused(str(error).removeprefix("rank 0: CheckpointRefused: ")) from None


def _refused(path: Path, error: BaseException) -> RunEnded:
    """Why Megatron did not load, in one line."""
    for failure, *_ in getattr(error, "failures", {}).values():
        if isinstance(failure, RunEnded):
            return failure
        error = failure
    if not isinstance(error, EXPECTED):
        traceback.print_exception(error)
    said = str(error).strip().splitlines()
    reason = refused_pickle(error) or (f"{type(error).__name__}: {said[0]:.500}" if said else type(error).__name__)
    remedy = f"{OTHER_CHECKPOINT}, or correct the setting that this names"
    if "OptimizerParamScheduler" in reason:
        remedy = "give the schedule of the run that saved it, or --override-opt_param-scheduler for the new one"
    return CheckpointRefused(f"{path}: not loaded: {reason}: {remedy}", on_every_rank=False)
