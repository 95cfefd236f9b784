"""Routing and balance of a run: to TensorBoard, to telemetry.jsonl, and as one console line.

Rides on Megatron's MoE metrics tracker, whose ``report`` every rank calls once a step. Only steps that log copy
anything from the device.
"""

import sys
from collections.abc import Callable
from pathlib import Path

import torch
from megatron.core.transformer.moe.moe_logging import MoEMetricsTracker

from hmoe_megatron.telemetry.accounting import ParameterCounts
from hmoe_megatron.telemetry.counters import groups_of_all_ranks
from hmoe_megatron.telemetry.idle_experts import IdleExperts
from hmoe_megatron.telemetry.record import console_line, max_over_mean, over_layers, routing_record, scalars_of
from hmoe_megatron.telemetry.writer import TelemetryFile


class HMoEMetricsTracker(MoEMetricsTracker):
    """Megatron's tracker, with the HMoE losses and, every ``log_interval`` steps, a telemetry record."""

    def __init__(
        self,
        layout,
        hidden_size: int,
        parameters: ParameterCounts,
        log_interval: int,
        run_dir: Path | None,
        end_for_router,
        tokens_per_s: Callable[[int], float],
    ):
        """end_for_router(step, layers): ends the run where routers of `layers`, decoder layers, were not finite.
        tokens_per_s: of so many last steps."""
        super().__init__()
        self.end_for_router, self.tokens_per_s = end_for_router, tokens_per_s
        self.steps = self.reports = 0  # since the last that logged, since the start
        self.layout, self.hidden_size, self.parameters = layout, hidden_size, parameters
        self.log_interval = log_interval
        layout.stats.timing = log_interval == 1  # the first step logs only then
        self.file = TelemetryFile(run_dir) if run_dir else None
        self.losses = list(layout.settings.loss_coeffs)
        self.idle = IdleExperts(layout.layers, layout.settings.idle_expert_steps)
        self.active_width = None  # latest measurement

    def report(self, loss_scale, iteration, writer=None, wandb_writer=None, *, track_names=None, **named):
        """MoEMetricsTracker.report with our losses, then telemetry on steps that log.

        On other steps the writers get nothing: a scalar that is written is copied from the device.
        """
        logs = iteration % self.log_interval == 0
        self.steps, self.reports = self.steps + 1, self.reports + 1
        if not logs:
            writer = wandb_writer = None
        log = super().report(
            loss_scale, iteration, writer, wandb_writer, track_names=[*(track_names or []), *self.losses], **named
        )
        if logs:
            self._log(iteration, writer, wandb_writer)
        self.layout.stats.timing = (iteration + 1) % self.log_interval == 0
        return log

    def _log(self, iteration, writer, wandb_writer):
        device = torch.device(torch.cuda.current_device())
        counts_LE, tokens_L, not_finite = self.layout.stats.take(groups_of_all_ranks(), device)
        if not_finite:
            self.end_for_router(iteration, not_finite)
        own_ms = torch.tensor([self.layout.stats.take_expert_time_ms()], dtype=torch.float64, device=device)
        rank_ms = [torch.empty_like(own_ms) for _ in range(torch.distributed.get_world_size())]
        torch.distributed.all_gather(rank_ms, own_ms)
        rank_ms = torch.cat(rank_ms).tolist()

        record = routing_record(counts_LE.numpy(), tokens_L.numpy(), self.layout, self.hidden_size, self.parameters)
        self.active_width = record["active_width"]
        record = {"iteration": iteration, **record, "expert_time_ms": rank_ms, "time_balance": max_over_mean(rank_ms)}
        record["tokens_per_s"] = self.tokens_per_s(self.steps)
        if self.reports > 1:  # Megatron's clock goes on over the first step, if that logs
            self.steps = 0
        if torch.distributed.get_rank() != torch.distributed.get_world_size() - 1:
            return  # the last rank has Megatron's writers and its console
        record["over_layers"] = over_layers(record)
        print(console_line(record), flush=True)
        if warning := self.idle.look(iteration, counts_LE, max(0, iteration - self.log_interval)):
            print(warning, file=sys.stderr, flush=True)
        if self.file:
            self.file.write(record)
        scalars = scalars_of(record)
        if writer is not None:
            for name, value in scalars.items():
                writer.add_scalar(name, value, iteration)
        if wandb_writer is not None:
            wandb_writer.log(scalars, iteration)
