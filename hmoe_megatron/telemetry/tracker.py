"""Routing and balance of a run: to TensorBoard, to telemetry.jsonl, and as one console line.

Rides on Megatron's MoE metrics tracker, whose ``report`` every rank calls once a step. Only steps that log copy
anything from the device. Legend: L MoE layers, E logical experts, R expert-parallel ranks.
"""

import errno
import json
import os
import sys
from pathlib import Path

import numpy as np
import torch
from megatron.core import parallel_state
from megatron.core.transformer.moe.moe_logging import MoEMetricsTracker

from hmoe_megatron.telemetry.accounting import ParameterCounts, expert_parameters
from hmoe_megatron.files import TELEMETRY_FILE, atomic_write
from hmoe_megatron.telemetry.idle_experts import IdleExperts
from hmoe_megatron.nan_guard.guard import end_for_router


def summary(values_L) -> dict[str, float]:
    """min, p50, p90, p95 and max over layers."""
    values = np.asarray(values_L, dtype=float)
    p50, p90, p95 = np.percentile(values, (50, 90, 95))
    return {"min": values.min(), "p50": p50, "p90": p90, "p95": p95, "max": values.max()}


def max_over_mean(values) -> float:
    """1 when all ranks have the same; 1 also when none has anything."""
    values = np.asarray(values, dtype=float)
    return float(values.max() / values.mean()) if values.any() else 1.0


def routing_record(counts_LE, tokens_L, layout, hidden_size: int, parameters: ParameterCounts) -> dict:
    """What a step's token counts say, as plain numbers.

    counts_LE: tokens that chose each logical expert, over all ranks; tokens_L: tokens routed. ``layout``: ExpertLayout.
    Shares are of a layer's routed tokens (or FLOPs) and sum to 1 over experts. Balances are max over mean over ranks.
    """
    counts_LE, tokens_L = np.asarray(counts_LE, float), np.maximum(np.asarray(tokens_L, float), 1)
    widths_LE = np.array([layout.widths[layer] for layer in layout.layers], float)
    cost_LE = counts_LE * widths_LE
    cost_LR, tokens_LR = _by_rank(layout, counts_LE)
    active_width_L = cost_LE.sum(1) / tokens_L
    active_L = expert_parameters(hidden_size, active_width_L)
    return {
        "activated_parameters": float(parameters.always_active + active_L.sum()),
        "total_parameters": parameters.total,
        "active_width": float(active_width_L.mean()),
        "experts_per_token": float((counts_LE.sum(1) / tokens_L).mean()),
        "experts_without_token": [[layout.layers[row], int(e)] for row, e in np.argwhere(counts_LE == 0)],
        "flops_balance": max_over_mean(cost_LR.sum(0)),
        "token_balance": max_over_mean(tokens_LR.sum(0)),
        "layers": [
            {
                "layer": layer,
                "token_share": _share(counts_LE[row]),
                "flops_share": _share(cost_LE[row]),
                "experts_per_token": float(counts_LE[row].sum() / tokens_L[row]),
                "activated_expert_parameters": float(active_L[row]),
                "flops_balance": max_over_mean(cost_LR[row]),
                "token_balance": max_over_mean(tokens_LR[row]),
            }
            for row, layer in enumerate(layout.layers)
        ],
    }


def _share(values_E) -> list[float]:
    return (values_E / max(values_E.sum(), 1)).tolist()


def _by_rank(layout, counts_LE):
    """(tokens x width, tokens) of every expert-parallel rank and layer under the plan, [L, R] each."""
    shape = (len(layout.layers), len(layout.plan.layers[0].pieces))
    cost_LR, tokens_LR = np.zeros(shape), np.zeros(shape)
    for row, layer in enumerate(layout.layers):
        for rank, pieces in enumerate(layout.pieces(layer)):
            cost_LR[row, rank] = sum(counts_LE[row, piece.expert] * piece.width for piece in pieces)
            tokens_LR[row, rank] = sum(counts_LE[row, piece.expert] for piece in pieces)
    return cost_LR, tokens_LR


LAYER_SUMMARIES = ("activated_expert_parameters", "experts_per_token", "flops_balance", "token_balance")


def over_layers(record: dict) -> dict[str, dict[str, float]]:
    """min / p50 / p90 / p95 / max over layers of what a record says by layer."""
    return {name: summary([layer[name] for layer in record["layers"]]) for name in LAYER_SUMMARIES}


def console_line(record: dict) -> str:
    """One line of at most 100 columns."""
    return (
        f" hmoe {record['iteration']} | active {record['activated_parameters'] / 1e6:.1f}M of "
        f"{record['total_parameters'] / 1e6:.1f}M, {record['experts_per_token']:.2f} experts/token | "
        f"max/mean FLOPs {record['flops_balance']:.2f} time {record['time_balance']:.2f} | "
        f"idle {len(record['experts_without_token'])}"
    )


class TelemetryFile:
    """Append-only JSON lines of one run. A resumed run first drops the steps it is about to do again.

    A disk that is full or read-only costs records, not the run; it is said once.
    """

    def __init__(self, directory: Path):
        self.path = Path(directory) / TELEMETRY_FILE
        self._file = None
        self._first = None  # iteration of the first record of this run
        self._told = False

    def write(self, record: dict) -> None:
        """Append one record and hand it to the system at once, so that a killed run keeps it."""
        self._first = self._first or record["iteration"]
        try:
            if self._file is None:
                self._drop_from(self._first)
                self._file = self.path.open("ab", buffering=0)
            self._append((json.dumps(record, allow_nan=False) + "\n").encode())
        except OSError as error:
            if not self._told:
                print(f" {self.path}: {error.strerror}: records are lost, training goes on", flush=True)
                self._told = True

    def _append(self, line: bytes) -> None:
        """All of the line or nothing. Raises OSError."""
        end = os.fstat(self._file.fileno()).st_size
        written = self._file.write(line)
        if written < len(line):
            self._file.truncate(end)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def _drop_from(self, iteration: int) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if not self.path.exists():
            return
        kept = []
        for line in self.path.read_text(encoding="utf-8").splitlines():
            try:
                if json.loads(line)["iteration"] < iteration:
                    kept.append(line + "\n")
            except (ValueError, KeyError, TypeError):
                continue  # the last line of a killed run may be cut off
        atomic_write(self.path, "".join(kept).encode())


class HMoEMetricsTracker(MoEMetricsTracker):
    """Megatron's tracker, with the HMoE losses and, every ``log_interval`` steps, a telemetry record."""

    def __init__(self, layout, hidden_size: int, parameters: ParameterCounts, log_interval: int, run_dir: Path | None):
        super().__init__()
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
        groups = (
            parallel_state.get_tensor_and_data_parallel_group(with_context_parallel=True),
            parallel_state.get_pipeline_model_parallel_group(),
        )
        counts_LE, tokens_L = self.layout.stats.take(groups, device)
        end_for_router(iteration, [self.layout.layers[row] for row in tokens_L.isnan().nonzero().flatten()])
        own_ms = torch.tensor([self.layout.stats.take_expert_time_ms()], dtype=torch.float64, device=device)
        rank_ms = [torch.empty_like(own_ms) for _ in range(torch.distributed.get_world_size())]
        torch.distributed.all_gather(rank_ms, own_ms)
        rank_ms = torch.cat(rank_ms).tolist()

        record = routing_record(counts_LE.numpy(), tokens_L.numpy(), self.layout, self.hidden_size, self.parameters)
        self.active_width = record["active_width"]
        record = {"iteration": iteration, **record, "expert_time_ms": rank_ms, "time_balance": max_over_mean(rank_ms)}
        if torch.distributed.get_rank() != torch.distributed.get_world_size() - 1:
            return  # the last rank has Megatron's writers and its console
        record["over_layers"] = over_layers(record)
        print(console_line(record), flush=True)
        if warning := self.idle.look(iteration, counts_LE, max(0, iteration - self.log_interval)):
            print(warning, file=sys.stderr, flush=True)
        if self.file:
            self.file.write(record)
        scalars = _scalars(record)
        if writer is not None:
            for name, value in scalars.items():
                writer.add_scalar(name, value, iteration)
        if wandb_writer is not None:
            wandb_writer.log(scalars, iteration)


def _scalars(record: dict) -> dict[str, float]:
    """A record as TensorBoard scalars."""
    names = ("activated_parameters", "experts_per_token", "flops_balance", "token_balance", "time_balance")
    scalars = {f"hmoe/{name}": record[name] for name in names}
    scalars["hmoe/experts_without_token"] = len(record["experts_without_token"])
    for name, parts in record["over_layers"].items():
        scalars |= {f"hmoe/{name}/{part}": value for part, value in parts.items()}
    for layer in record["layers"]:
        for kind in ("token_share", "flops_share"):
            for expert, value in enumerate(layer[kind]):
                scalars[f"hmoe/{kind}/layer_{layer['layer']}/expert_{expert}"] = value
    for rank, value in enumerate(record["expert_time_ms"]):
        scalars[f"hmoe/expert_time_ms/rank_{rank}"] = value
    return scalars
