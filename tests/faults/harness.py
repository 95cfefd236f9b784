"""Runs that are made to fail, and what must hold after each: see docs/faults.md."""

import functools
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.distributed.checkpoint import FileSystemReader, load
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from hmoe_megatron.checkpoint import directory, manifest
from hmoe_megatron.checkpoint.lock import LOCK_FILE
from hmoe_megatron.files import LOG_FILE, PLAN_FILE, REPLANS_FILE, RUN_ARGUMENTS_FILE, RUN_SOFTWARE_FILE, TELEMETRY_FILE
from tests.distributed.ranks import RankEnd, end_ranks
from tests.distributed.training_run import TINY
from tests.faults.inside import CPU_S, KILLED, LOSSES, pretrain

STEPS, INTERVAL = 8, 2
TIMEOUT_S = 300.0  # of a run that takes seconds on an idle machine: what is over it hangs
MODEL = (
    "--hmoe-console megatron --hmoe-widths 16,32,48,64 --make-vocab-size-divisible-by 1 --expert-model-parallel-size 2 "
    f"--num-workers 0 --train-iters {STEPS} --save-interval {INTERVAL}"
).split()
KEPT = {directory.TRACKER_FILE, LOCK_FILE, LOG_FILE, PLAN_FILE, RUN_ARGUMENTS_FILE, RUN_SOFTWARE_FILE, TELEMETRY_FILE}
KEPT |= {REPLANS_FILE}
ERROR = re.compile(r"pretrain_hmoe\.py: error: (.*)")


@dataclass(frozen=True)
class Ended:
    """How the ranks of a run ended. killed: phase and moment of the one that was killed by `inside.die`; losses: step
    -> loss in hexadecimal, of all runs with this scratch directory."""

    ranks: list[RankEnd]
    killed: str | None
    losses: dict[int, str]

    @property
    def codes(self) -> list[int | None]:
        return [rank.exit_code for rank in self.ranks]

    @property
    def output(self) -> str:
        return "\n".join(rank.output for rank in self.ranks)

    @property
    def error(self) -> str:
        """What the run says when it ends with a reason; it must say so in one line, once for each rank that met it."""
        found = ERROR.findall(self.output)
        assert found and len({re.sub(r"^rank \d+: ", "", line) for line in found}) == 1, f"{found}\n{self.tail}"
        return found[0]

    @property
    def tail(self) -> str:
        return "\n".join(
            f"rank {number}, exit code {rank.exit_code}:\n" + "\n".join(rank.output.splitlines()[-25:])
            for number, rank in enumerate(self.ranks)
        )


def run(ranks: int, root: Path, scratch: Path, *faults: functools.partial, flags: str = "", mock: bool = True) -> Ended:
    """Train in `root`, from what is there, with `faults` of tests.faults.inside. No rank hangs, none leaves a process.

    Losses of the steps go to `scratch`; where a step is done twice, the later one must give the same loss.
    """
    scratch.mkdir(exist_ok=True)
    (scratch / KILLED).unlink(missing_ok=True)
    argv = [flag for flag in TINY if mock or flag != "--mock-data"]
    argv += [*MODEL, "--save", str(root), "--load", str(root), *flags.split()]
    ended = end_ranks(ranks, pretrain, argv, scratch, faults, timeout_s=TIMEOUT_S)
    killed = (scratch / KILLED).read_text() if (scratch / KILLED).exists() else None
    ended = Ended(ended, killed, read_losses(scratch))
    assert None not in ended.codes, f"a rank hangs\n{ended.tail}"
    assert not any(rank.orphans for rank in ended.ranks), f"a process is left\n{ended.tail}"
    return ended


def read_losses(scratch: Path) -> dict[int, str]:
    losses = {}
    lines = (scratch / LOSSES).read_text().splitlines() if (scratch / LOSSES).exists() else []
    for step, loss in (line.split() for line in lines):
        assert losses.setdefault(int(step), loss) == loss, f"step {step} was repeated with another loss"
    return losses


@dataclass(frozen=True)
class Reference:
    """A run that nothing befell: its directory, with a checkpoint of each step, its losses, a rank's processor time."""

    root: Path
    ranks: int
    losses: dict[int, str]
    cpu_s: float

    @functools.cache  # noqa: B019  one for each test session
    def tensors(self, iteration: int) -> dict[str, torch.Tensor]:
        return tensors(directory.checkpoint_path(self.root, iteration))

    def __hash__(self):
        return id(self)

    def copy_to(self, root: Path, iteration: int) -> Path:
        """`root` as it was when the run had saved `iteration`; returns that checkpoint."""
        path = directory.checkpoint_path(root, iteration)
        shutil.copytree(directory.checkpoint_path(self.root, iteration), path)
        directory.write_tracker(root, iteration)
        return path


def reference(ranks: int, folder: Path, flags: str = "") -> Reference:
    ended = run(ranks, folder / "run", folder / "scratch", flags=f"{flags} --save-interval 1")
    assert ended.codes == [0] * ranks, ended.tail
    assert sorted(ended.losses) == list(range(1, STEPS + 1)) and len(set(ended.losses.values())) == STEPS
    return Reference(folder / "run", ranks, ended.losses, float((folder / "scratch" / CPU_S).read_text()))


def tensors(path: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint: weights, optimizer."""
    stored = FileSystemReader(str(path)).read_metadata().state_dict_metadata
    state = {
        name: torch.empty(kind.size, dtype=kind.properties.dtype)
        for name, kind in stored.items()
        if isinstance(kind, TensorStorageMetadata)
    }
    load(state, storage_reader=FileSystemReader(str(path)), no_dist=True)
    return state


def check_lasting(root: Path, expected: Reference) -> int | None:
    """Nothing under a final name is half written, and the last good checkpoint, if there is one, equals the reference's
    of that iteration bit by bit. Returns its iteration."""
    for path in (entry for entry in root.glob("iter_*") if any(entry.iterdir())):
        recorded = manifest.load_manifest(path).files
        assert manifest.damaged_files(path, recorded) == []
        assert {entry.name for entry in path.iterdir()} == {*recorded, directory.MANIFEST_FILE}
    complete = directory.complete_iterations(root)
    tracked = directory.read_tracker(root)
    assert tracked is None or tracked in complete, f"{tracked} is tracked, complete are {complete}"
    for iteration in complete:
        check_equal(tensors(directory.checkpoint_path(root, iteration)), expected.tensors(iteration))
    return tracked


def check_equal(found: dict, expected: dict) -> None:
    assert found.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []


def check_little_lost(ended: Ended, tracked: int | None, intervals: int = 1) -> None:
    """Not more than `intervals` save intervals of steps were done and are not in a checkpoint. Two for asynchronous
    saves: steps go on while one is written, and the next waits for it."""
    done = max(ended.losses, default=0)
    assert done - (tracked or 0) <= intervals * INTERVAL, f"{done} steps done, {tracked} saved"


def check_finished(ended: Ended, root: Path, expected: Reference) -> None:
    """A run ended well, bitwise as the reference, and nothing of an earlier fault is left."""
    assert ended.codes == [0] * expected.ranks, ended.tail
    assert ended.losses == {step: expected.losses[step] for step in ended.losses} and STEPS in ended.losses
    assert check_lasting(root, expected) == STEPS
    left = {name for name in os.listdir(root) if not re.fullmatch(r"iter_\d{7}", name)} - KEPT
    assert left == set()
