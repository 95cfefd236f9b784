"""Between two training steps: loads of the window, a decision on rank 0, the moves, what is said of them."""

import argparse
import time
from pathlib import Path

import numpy as np
import torch
from megatron.training import async_utils
from megatron.training.global_vars import get_tensorboard_writer

from hmoe_megatron import collectives
from hmoe_megatron.files import PLAN_FILE, REPLANS_FILE
from hmoe_megatron.placement.plan import PlacementPlan
from hmoe_megatron.replan.decision import Decision, Verdict
from hmoe_megatron.replan.moves import change_plan
from hmoe_megatron.replan.proposal import proposed_plan, rows_like
from hmoe_megatron.telemetry.counters import groups_of_all_ranks
from hmoe_megatron.telemetry.writer import TelemetryFile
from hmoe_megatron.validate_args.sizes import expert_tensor_parallel_size

FIRST_INTERVAL, LONGEST_INTERVAL = 10, 1000  # steps, of `auto`


class Replanner:
    """layout: ExpertLayout, whose plan changes. finish_saves: waits until no checkpoint is being written."""

    def __init__(self, layout, cut_multiple: int, run_dir: Path | None, finish_saves):
        settings = layout.settings
        self.layout, self.finish_saves, self.run_dir = layout, finish_saves, run_dir
        self.is_auto = settings.replan_interval == "auto"
        self.interval = FIRST_INTERVAL if self.is_auto else int(settings.replan_interval)
        self.next_look, self.waits = None, False
        self.max_cuts, self.cut_multiple = settings.max_cuts, cut_multiple
        self.decision = Decision(settings.replan_max_loss)
        self.file = TelemetryFile(run_dir, REPLANS_FILE) if run_dir else None
        self.began_s = None
        layout.stats.open_window()

    def before_step(self, done: int, model, optimizer) -> None:
        """done: steps of the run so far. Every rank calls it before a step. Ordinary steps wait for nothing here."""
        if self.began_s is None:  # the first step of this start: there are no loads yet
            self.began_s = time.monotonic()
            self.next_look = self._after(done)
        if done < self.next_look:
            return
        tokens_LE = self._loads()
        verdict = collectives.run_on_rank0(lambda: self._judged(tokens_LE))
        if self.is_auto:
            self.interval = FIRST_INTERVAL if verdict.plan else min(2 * self.interval, LONGEST_INTERVAL)
        self.next_look = self._after(done)
        if verdict.plan is None:
            if verdict.why and not self.waits and collectives.rank() == 0:  # once, until something moves
                print(f" step {done:>6} | {verdict.why}", flush=True)
            self.waits |= bool(verdict.why)
            return
        self.waits = False
        self._change(done, verdict, model, optimizer)

    def _change(self, done: int, verdict: Verdict, model, optimizer) -> None:
        self.finish_saves()
        before = self.layout.plan
        moved = change_plan(model, optimizer, self.layout, verdict.plan)
        sent_bytes = sum(collectives.all_ranks(lambda: moved.sent_bytes))
        if writer := get_tensorboard_writer():  # of the last rank
            values = {"bytes": sent_bytes, "seconds": moved.seconds, "balance-before": verdict.before}
            for name, value in (values | {"balance-after": verdict.after}).items():
                writer.add_scalar(f"replan/{name}", value, done)
        if collectives.rank() == 0:
            self.decision.made(before, self.layout.plan, moved.seconds)
            self._say(done, verdict, moved, sent_bytes)

    def _after(self, done: int) -> int:
        """The next step at which to look: steps that are multiples of the interval, where it does not change."""
        return done + (self.interval if self.is_auto else self.interval - done % self.interval)

    def _loads(self) -> list[np.ndarray]:
        """Tokens of each expert of each layer since the last call, of all ranks."""
        device = torch.device(torch.cuda.current_device())
        return list(self.layout.stats.take_window(groups_of_all_ranks(), device).numpy())

    def _judged(self, tokens_LE) -> Verdict:
        plan, began_s = self.layout.plan, time.monotonic()
        if min(tokens_E.sum() for tokens_E in tokens_LE) <= 0:  # no step yet, or one that was left out
            return Verdict(None, 0.0, 1.0, 1.0, "")
        tokens_LE = rows_like(plan, tokens_LE)
        proposed = proposed_plan(plan, tokens_LE, self.layout.most, self.max_cuts, self.cut_multiple)
        self.decision.looked_s += time.monotonic() - began_s
        return self.decision.judge(plan, proposed, tokens_LE, time.monotonic() - self.began_s)

    def _say(self, done: int, verdict: Verdict, moved, sent_bytes: int) -> None:
        plan: PlacementPlan = self.layout.plan
        line = f"experts moved in {len(moved.layers)} layers, {sent_bytes / 1e6:,.1f} MB in {moved.seconds:.2f} s"
        balance = f"slowest rank over mean {verdict.before:.3f} -> {verdict.after:.3f}"
        print(f" step {done:>6} | {line}, {balance}", flush=True)
        for problem in filter(None, (verdict.why, moved.failure)):
            print(f" step {done:>6} | {problem}", flush=True)
        if self.file:
            plan.save(self.run_dir / PLAN_FILE)
            self.file.write(
                {
                    "iteration": done,
                    "layers": moved.layers,
                    "bytes": sent_bytes,
                    "seconds": moved.seconds,
                    "balance_before": verdict.before,
                    "balance_after": verdict.after,
                    "gain": verdict.gain,
                    "failure": moved.failure,
                }
            )


def replanner_of(args: argparse.Namespace, layout, run_dir: Path | None):
    """What --hmoe-replan-interval does before each step; None without it."""
    if layout.settings.replan_interval is None:
        return None
    multiple = layout.settings.cut_multiple * expert_tensor_parallel_size(args)
    return Replanner(
        layout, multiple, run_dir, lambda: async_utils.maybe_finalize_async_save(blocking=True)
    ).before_step
