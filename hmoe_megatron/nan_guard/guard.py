"""A NaN or an infinity ends the run on every rank, before the optimizer takes it in and before a checkpoint does.

Stock Megatron 0.19.2 saves a checkpoint in the middle of the bad step, exits 16, and exits 16 again at every resume on
the same GPU; and it lets the first step after a start pass unchecked. Here the step is repeated once, in place, to see
whether the fault comes back and in which module; then all ranks leave Megatron's loop with exit code 17 and one line.
On a healthy step this does what stock does: the same checks, the same reduction of one flag.
"""

import math
import sys

import torch
from megatron.core import rerun_state_machine
from megatron.core.rerun_state_machine import (
    EXIT_CODE_FAILED_ON_RESULT_VALIDATION,
    RerunMode,
    RerunState,
    RerunStateMachine,
)

from hmoe_megatron.nan_guard.locate import CHECK, Finding, ModuleProbe, finding_of_norm, findings_of, first_of_all_ranks
from hmoe_megatron.patches import hooks

EXIT_CODE = EXIT_CODE_FAILED_ON_RESULT_VALIDATION


class NumericGuard(RerunStateMachine):
    """Megatron's rerun state machine, whose fatal checks agree over all ranks, name the culprit and save nothing.

    ``--rerun-mode disabled`` ends the run without repeating the step. Evaluation, where Megatron switches the machine
    off, raises on the rank that sees the fault, as stock does.
    """

    def __init__(self, *args, **named):
        super().__init__(*args, **named)
        self.first_iteration_complete = True  # the first step is checked too: no checkpoint is needed for that
        self.chunks, self.step = [], 0  # of the loop, steps from 1
        self.rejected = {}  # state of the machine -> the first check that this rank failed in it
        self.fault = None  # None, or "reproduced", "transient", "once": on all ranks the same
        self.probe = None

    def validate_result(self, result, rejection_func, message, comparison_func=None, tolerance=0.0, fatal=True):
        """RerunStateMachine.validate_result; a fatal rejection in training is noted and acted on at the step's end."""
        stats_only = self.mode is RerunMode.REPORT_DETERMINISM_STATS
        if not fatal or stats_only or self.state is RerunState.NOT_RUNNING_YET:
            return super().validate_result(result, rejection_func, message, comparison_func, tolerance, fatal)
        if rejection_func(result):
            self.rejected.setdefault(self.state, message)
            self.rerun_requested = True
        return None

    def should_run_forward_backward(self, data_iterator):
        """RerunStateMachine.should_run_forward_backward: True once, and once more to repeat a step that failed."""
        ended = self.state
        if ended is RerunState.NOT_RUNNING_YET:
            self.rejected.clear()
        elif ended is RerunState.INITIAL_RUN and self.mode is RerunMode.DISABLED:
            if self._reduce_any(bool(self.rejected)):
                self.fault = "once"
        elif ended is RerunState.RERUNNING_IN_PLACE and self.mode is RerunMode.VALIDATE_RESULTS:
            self.probe.remove()
            states = (RerunState.INITIAL_RUN, RerunState.RERUNNING_IN_PLACE)
            first, again = self._reduce_any([state in self.rejected for state in states])
            if first or again:
                self.fault = "reproduced" if again else "transient"
                return False
        runs = super().should_run_forward_backward(data_iterator)
        if runs and self.state is RerunState.RERUNNING_IN_PLACE and self.mode is RerunMode.VALIDATE_RESULTS:
            self.probe = ModuleProbe(self.chunks)
        return runs

    def should_checkpoint_and_exit(self):
        """(False, whether to exit, exit code): nothing of a bad step is ever saved."""
        if self.fault:
            return False, True, EXIT_CODE
        return super().should_checkpoint_and_exit()

    def state_dict(self, data_iterator, ckpt_format, force=False) -> None:
        """Nothing: no checkpoint carries a fault to the next start."""

    def validate_state_dict(self, state_dict) -> bool:
        """False: a checkpoint of stock Megatron may hold a fault, and would end every resume with exit code 16."""
        return False

    def explain(self, stats, norm: float | None = None) -> None:
        """Print one line on rank 0: step, culprit, remedy. Every rank calls it. ``norm``: if it is what failed."""
        findings = findings_of(self.chunks, self.probe, stats, failed=bool(self.rejected))
        for message in self.rejected.values():
            findings.append(Finding((CHECK,), message))
        if norm is not None:
            findings.append(finding_of_norm(norm, self.chunks))
        cause, host = first_of_all_ranks(findings)
        if torch.distributed.get_rank() == 0:
            line = f"error: step {self.step}: {cause}. {remedy(self.fault, self.step, host)}"
            print(line, file=sys.stderr, flush=True)


def remedy(fault: str, step: int, host: str) -> str:
    """What the user can do. ``fault``: "reproduced", "transient", or another for a step that was not repeated."""
    resume = "No checkpoint was written; the last one is untouched"
    persistent = f"lower --lr, or leave the data of this step out with --iterations-to-skip {step}"
    if fault == "transient":
        hardware = f"suspect the hardware of {host}"
        return f"Repeating the step gave finite values. {resume}: resume from it; if it happens again, {hardware}"
    if fault == "reproduced":
        return f"Repeating the step gave it again. {resume}: resume from it; if that ends here too, {persistent}"
    return f"{resume}: resume from it; if that ends here again, {persistent}"


def end_for_router(step: int, layers: list[int]) -> None:
    """End the run: the routers of ``layers``, decoder layers, the same on all ranks, gave what is not finite.

    Minus infinity as a logit only keeps an expert from being chosen: loss and gradients stay finite.
    """
    if torch.distributed.get_rank() == 0:
        named = ", ".join(map(str, layers))
        cause = f"the router's logits in decoder layer {named} held NaN or infinity"
        print(
            f"error: step {step} or one since the last that was logged: {cause}. Resume from the last checkpoint; "
            "if that ends here again, lower --lr or go back to an older checkpoint",
            file=sys.stderr,
            flush=True,
        )
    sys.exit(EXIT_CODE)


def install(stats, before_step=None) -> None:
    """Put the guard into Megatron's training loop. ``stats``: the run's RoutingStats. before_step(steps done, model
    chunks, optimizer): called before each step."""
    from megatron.training import get_args

    def train_step(stock, forward_step_func, data_iterator, model, optimizer, *more, iteration, **named):
        guard = rerun_state_machine.get_rerun_state_machine()
        if not guard.chunks:
            guard.chunks = model
            if get_args().check_for_nan_in_loss_and_grad:
                _check_norm(optimizer, guard, stats)
        if before_step:
            before_step(iteration, model, optimizer)
        guard.step = iteration + 1
        result = stock(forward_step_func, data_iterator, model, optimizer, *more, iteration=iteration, **named)
        if guard.fault:
            if guard.fault != "norm":  # that one was explained before the optimizer changed anything
                guard.explain(stats)
            return {}, 1, False, True, EXIT_CODE, None, None, 0
        return result

    hooks.training_step(NumericGuard, train_step)


def _check_norm(optimizer, guard, stats) -> None:
    """Look at the gradient norm before it clips: sums over ranks may overflow where every rank's part is finite.

    All ranks see the same norm, so all leave together.
    """
    stock_norm = optimizer.get_grad_norm

    def get_grad_norm():
        norm = stock_norm()
        if norm is not None and not math.isfinite(norm):
            guard.fault = "norm"
            guard.explain(stats, norm)
        return norm

    optimizer.get_grad_norm = get_grad_norm
