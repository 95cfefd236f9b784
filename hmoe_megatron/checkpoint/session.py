"""The checkpoints of one run: found, compared and locked before anything starts, then put around Megatron's."""

import argparse
import contextlib
import time
from pathlib import Path
from typing import NamedTuple

from hmoe_megatron import collectives
from hmoe_megatron.checkpoint import directory, lock, settings
from hmoe_megatron.checkpoint.manifest import Manifest, load_manifest
from hmoe_megatron.exits import CheckpointRefused
from hmoe_megatron.files import PLAN_FILE
from hmoe_megatron.machine.software import versions
from hmoe_megatron.moe.layout import ExpertLayout
from hmoe_megatron.patches import hooks

_LAYOUT = (
    "world_size tensor_model_parallel_size pipeline_model_parallel_size virtual_pipeline_model_parallel_size "
    "context_parallel_size expert_model_parallel_size expert_tensor_parallel_size data_parallel_size "
    "use_distributed_optimizer padded_vocab_size"
).split()
MAX_VOCABULARY_ROWS = 1 << 28
TIDY_S = 60.0  # by which rank 0 may start later than another rank


class Start(NamedTuple):
    """The checkpoint that a run goes on from. lies: where it is now, if it is to be put back at `path`."""

    iteration: int
    path: Path
    lies: Path

    def plan_file(self) -> Path:
        """Its plan. Read before the directory is locked and tidied, which a start that fails must not do."""
        lies = self.lies / PLAN_FILE
        return lies if lies.exists() else self.path / PLAN_FILE  # rank 0 may have put it back by now

    def vocabulary_rows(self) -> int | None:
        """Rows of its embedding, with those that only pad the vocabulary; None where its manifest does not say it."""
        for folder in (self.lies, self.path):  # rank 0 may put it back just now
            with contextlib.suppress(CheckpointRefused):  # said when the settings are compared
                rows = load_manifest(folder).layout.get("padded_vocab_size")
                return rows if type(rows) is int and 0 < rows <= MAX_VOCABULARY_ROWS else None
        return None

    def wait(self) -> None:
        """Until rank 0 has put it back; before that nothing is in its place."""
        end_s = time.monotonic() + TIDY_S
        while self.lies != self.path and self.lies.exists() and time.monotonic() < end_s:
            time.sleep(0.05)


def starting_checkpoint(args: argparse.Namespace) -> Start | None:
    """What --load, --ckpt-step and --pretrained-checkpoint name; None where the run starts anew, as it may where it is
    to save to an empty --load itself. Raises CheckpointRefused."""
    pretrained = getattr(args, "pretrained_checkpoint", None)
    same = bool(args.load and args.save and Path(args.load).absolute() == Path(args.save).absolute())
    start = None
    if args.load:
        may_be_new = same and not args.exit_on_missing_checkpoint or bool(pretrained)
        start = directory.find(args.load, args.ckpt_step, may_be_new, put_back=same)
    if start is None and pretrained:
        start = directory.find(pretrained)
    return start and Start(start[0], directory.checkpoint_path(start[1].parent, start[0]), start[1])


class Checkpoints:
    """What `--save` and the checkpoint that it starts from mean for one run."""

    def __init__(self, args: argparse.Namespace, layout: ExpertLayout, start: Start | None):
        self.args, self.layout, self.hmoe, self.start = args, layout, layout.settings, start
        self.settings = settings.model_settings(args, layout.widths)
        self._lock = None

    def prepare(self) -> None:
        """Before any process group: lock and tidy --save (rank 0), compare the settings of `start`.

        Raises CheckpointRefused, DirectoryInUse, or ValueError for a --save that can't be written to.
        """
        if self.args.save and collectives.rank() == 0:
            self._take(Path(self.args.save))
        if self.start:
            self.start.wait()
            self.compare(self.start.path)
        if self.args.save and not self._goes_on_in_save():
            self._keep_others(Path(self.args.save))

    def _take(self, root: Path) -> None:
        try:
            root.mkdir(parents=True, exist_ok=True)
            self._lock = lock.hold(root)
            done = directory.tidy(root)
        except OSError as error:
            raise ValueError(f"--save {root}: {error.strerror}: give a directory that can be written to") from None
        for line in done if self._lock else [*done, "can't be locked on this file system: let one run only save here"]:
            print(f" {root}: {line}", flush=True)

    def _goes_on_in_save(self) -> bool:
        return bool(self.start) and self.start.path.parent.absolute() == Path(self.args.save).absolute()

    def _keep_others(self, root: Path) -> None:
        complete = directory.complete_iterations(root)
        if complete:
            raise ValueError(
                f"--save {root} holds the checkpoints of a run (the last: iteration {complete[-1]}), and "
                f"this run does not go on from them: add --load {root}, or give another --save"
            )

    def compare(self, path: Path) -> None:
        """Raises CheckpointRefused with every setting that differs and matters; says the others."""
        try:
            saved = load_manifest(path).settings
        except CheckpointRefused:
            if self.hmoe.skip_integrity and not (path / directory.MANIFEST_FILE).exists():
                return
            raise
        pretrained = self.args.pretrained_checkpoint
        finetune = self.args.finetune or bool(pretrained and path.parent.absolute() == Path(pretrained).absolute())
        found = settings.differences(saved, self.settings, finetune)
        if found.model:
            raise CheckpointRefused(
                f"{path} is of another model: {'; '.join(found.model)}: give the settings of the run "
                "that saved it (another plan, layout or number of ranks is no difference)"
            )
        reported = found.reported
        if finetune or self.args.no_load_optim:
            reported = [*reported, *found.optimizer]
        elif found.optimizer:
            raise CheckpointRefused(
                f"{path}: its optimizer state can't be read: {'; '.join(found.optimizer)}: give the settings of the "
                "run that saved it, or --no-load-optim to go on with its weights and new moments"
            )
        elif self.args.override_opt_param_scheduler or self.args.use_checkpoint_opt_param_scheduler:
            reported = [*reported, *found.schedule]
        elif found.schedule:
            raise CheckpointRefused(
                f"{path} has another schedule: {'; '.join(found.schedule)}: give that of the run that saved it, "
                "--override-opt_param-scheduler to go on with the new one, or --use-checkpoint-opt_param-scheduler to "
                "keep the old one"
            )
        if reported and collectives.rank() == 0:
            print(f" goes on with other settings: {'; '.join(reported)}", flush=True)

    def manifest(self, iteration: int, files: dict) -> Manifest:
        """Manifest of this run's checkpoint of `iteration`."""
        layout = {name: settings.plain(getattr(self.args, name, None)) for name in _LAYOUT}
        return Manifest(iteration, self.settings, layout, versions(), files)

    def install(self) -> None:
        """Put this run's save and load around Megatron's. Once a process."""
        from hmoe_megatron.checkpoint import reader, saving

        self.saver = saving.Saver(
            Path(self.args.save or "."),
            self.manifest,
            lambda folder: self.layout.plan.save(folder / PLAN_FILE),
            self.hmoe.max_failed_saves,
        )
        hooks.checkpoints(
            self.saver,
            self.load_checkpoint,
            reader.checkpoint_reader,
            saving.hashing_request,
            saving.write_or_raise,
            saving.finalize_together,
        )

    def load_checkpoint(self, stock, models, optimizer, scheduler, load_arg="load", **named):
        """Megatron's load_checkpoint of `start`; without one Megatron starts anew."""
        from hmoe_megatron.checkpoint import loading

        start = collectives.run_on_rank0(lambda: self.start)
        if start is None:
            return stock(models, optimizer, scheduler, load_arg, **named)
        with _setting(self.args, "ckpt_step", start.iteration):
            return loading.load_checkpoint(
                stock, start.path, self.hmoe.skip_integrity, models, optimizer, scheduler, load_arg, **named
            )

    def end(self) -> None:
        """When training is over. Raises SavingFailed if its last steps could not be saved."""
        self.saver.end()


@contextlib.contextmanager
def _setting(args, name: str, value):
    before = getattr(args, name)
    setattr(args, name, value)
    try:
        yield
    finally:
        setattr(args, name, before)
