"""Names of checkpoints in a run's directory, and the order in which they come to be there. No torch.

latest_checkpointed_iteration.txt   Megatron's tracker: the iteration of the last good checkpoint
iter_0000200/                       a checkpoint; it is complete when it holds a manifest
.iter_0000200.saving/               being written: becomes iter_0000200 by one rename when it is complete
.iter_0000200.replaced/             an older one of the same iteration, until the new one is in its place
"""

import os
import re
import shutil
from pathlib import Path

from hmoe_megatron.exits import CheckpointRefused
from hmoe_megatron.files import (
    PLAN_FILE,
    REPLANS_FILE,
    RUN_ARGUMENTS_FILE,
    RUN_SOFTWARE_FILE,
    TELEMETRY_FILE,
    atomic_write,
    sync,
)

TRACKER_FILE = "latest_checkpointed_iteration.txt"
MANIFEST_FILE = "hmoe_manifest.json"
MAX_ITERATION = 10**12
_CHECKPOINT = re.compile(r"iter_(\d{7,12})")
_LEFTOVER = re.compile(r"\.(iter_\d{7,12})\.(saving|replaced)")
_WRITTEN_WHOLE = "|".join(
    map(re.escape, (TRACKER_FILE, PLAN_FILE, RUN_ARGUMENTS_FILE, RUN_SOFTWARE_FILE, TELEMETRY_FILE, REPLANS_FILE))
)
_TEMPORARY = re.compile(rf"\.({_WRITTEN_WHOLE})\.\d+\.tmp")  # of `atomic_write`


def checkpoint_path(root: Path, iteration: int) -> Path:
    """Directory of the checkpoint of this iteration, as Megatron names it."""
    return Path(root) / f"iter_{iteration:07d}"


def saving_path(path: Path) -> Path:
    """Where the checkpoint `path` is written before it is complete."""
    return path.with_name(f".{path.name}.saving")


def _replaced_path(path: Path) -> Path:
    return path.with_name(f".{path.name}.replaced")


def read_tracker(root: Path) -> int | None:
    """Iteration that the tracker names; None where there is no tracker. Raises CheckpointRefused for any other text."""
    tracker = Path(root) / TRACKER_FILE
    try:
        with tracker.open(encoding="utf-8", errors="replace") as file:
            text = file.read(40).strip()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise CheckpointRefused(f"{tracker}: {error.strerror}") from None
    if re.fullmatch(r"\d{1,12}", text) and int(text) > 0:
        return int(text)
    what = f"holds {text!r}, no iteration" if text else "is empty"
    raise CheckpointRefused(f"{tracker} {what}: write the number of a checkpoint into it; {_listed(root)}")


def write_tracker(root: Path, iteration: int) -> None:
    """Name the last good checkpoint; the tracker is never half written."""
    atomic_write(Path(root) / TRACKER_FILE, str(iteration).encode())


def complete_iterations(root: Path) -> list[int]:
    """Iterations whose checkpoint holds a manifest, ascending; what the manifest says is not looked at."""
    found = [(match, entry) for entry in _entries(root) if (match := _CHECKPOINT.fullmatch(entry.name))]
    return sorted(int(match[1]) for match, entry in found if (entry / MANIFEST_FILE).is_file())


def _entries(root: Path) -> list[Path]:
    try:
        return sorted(Path(root).iterdir())
    except FileNotFoundError:
        return []


def _listed(root: Path) -> str:
    complete = complete_iterations(root)
    return (
        f"complete checkpoints there: {', '.join(map(str, complete[-8:]))}"
        if complete
        else ("no complete checkpoint is there")
    )


def find(
    root: str | Path, step: int | None = None, may_be_new: bool = False, put_back: bool = False
) -> tuple[int, Path] | None:
    """(iteration, directory) of the checkpoint that a run goes on from: `step`, else the tracker's.

    put_back: of one whose replacement was cut off, the directory where it lies until `tidy` puts it back.

    Without a tracker the newest complete one: the run was killed after that checkpoint was in its place and before the
    tracker named it. None if there is nothing yet and `may_be_new`. Raises CheckpointRefused with what to do.
    """
    root = Path(root)
    if (match := _CHECKPOINT.fullmatch(root.name)) and (root / MANIFEST_FILE).exists():
        raise CheckpointRefused(
            f"--load {root} is one checkpoint: give its run, --load {root.parent} --ckpt-step {int(match[1])}"
        )
    if not root.is_dir():
        if may_be_new and not root.exists():
            return None
        what = "is no directory" if root.exists() else "does not exist"
        raise CheckpointRefused(f"--load {root} {what}: give the directory that --save of a run named, or no --load")
    iteration = step or read_tracker(root) or max(complete_iterations(root), default=None)
    if iteration is None:
        if may_be_new:
            return None
        raise CheckpointRefused(
            f"--load {root}: no checkpoint is there ({TRACKER_FILE} is missing): give the "
            "directory that --save of a run named; a new run has no --load, or one equal to --save"
        )
    path = checkpoint_path(root, iteration)
    replaced = _replaced_path(path)
    if put_back and not (path / MANIFEST_FILE).is_file() and (replaced / MANIFEST_FILE).is_file():
        return iteration, replaced
    if not path.is_dir():
        named = "--ckpt-step" if step else TRACKER_FILE
        raise CheckpointRefused(
            f"{path}: missing, and {named} names it; {_listed(root)}: give one of them as --ckpt-step N"
        )
    return iteration, path


def begin(path: Path) -> Path:
    """An empty directory to write the checkpoint `path` to."""
    saving = saving_path(path)
    if saving.exists():
        shutil.rmtree(saving)
    saving.mkdir(parents=True)
    return saving


def publish(path: Path) -> None:
    """Put the complete checkpoint of `begin(path)` in its place; one that was there goes when the new one is in."""
    replaced = _replaced_path(path)
    if path.exists() and any(path.iterdir()):
        if replaced.exists():
            shutil.rmtree(replaced)
        os.rename(path, replaced)
    os.rename(saving_path(path), path)  # also over an empty directory
    sync(path.parent)
    if replaced.exists():
        shutil.rmtree(replaced)


def tidy(root: Path) -> list[str]:
    """Undo what a killed run left half done; returns what was done, a line each. Only for the one run that saves there.

    A checkpoint that was being replaced goes back; one that was being written goes; an empty directory and a temporary
    file go. Anything else stays, also a checkpoint without a manifest, which may be another program's.
    """
    done = []
    for entry in _entries(root):
        if entry.is_symlink() or not entry.is_dir():
            if _TEMPORARY.fullmatch(entry.name):
                entry.unlink()
                done.append(f"{entry.name}: removed, left by a write that was cut off")
            continue
        if match := _LEFTOVER.fullmatch(entry.name):
            path = entry.with_name(match[1])
            if match[2] == "replaced" and not (path / MANIFEST_FILE).is_file():
                _remove_empty(path)
                if not path.exists():
                    os.rename(entry, path)
                    done.append(f"{path.name}: put back, a save that was to replace it was cut off")
                    continue
            shutil.rmtree(entry)
            done.append(f"{entry.name}: removed, left by a save that was cut off")
        elif _CHECKPOINT.fullmatch(entry.name) and _remove_empty(entry):
            done.append(f"{entry.name}: removed, it was empty")
    return done


def _remove_empty(folder: Path) -> bool:
    try:
        folder.rmdir()
    except OSError:  # it holds something, or is not there
        return False
    return True
