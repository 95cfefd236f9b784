"""A rank of benchmarks/replan.py: a training run under a workload, with or without experts that move."""

import statistics
import time
from pathlib import Path

import torch

from benchmarks.load_traces import trace
from benchmarks.machine import ROOT
from benchmarks.worker import Worker, main, unwrapped

TRACE_STEPS = 10_000
CHOSEN = 50.0  # added to the logits of the experts that a token is to choose
SENDS = 7  # of the same bytes alone; their median counts


class ReplanWorker(Worker):
    """``begin`` first; then ``train`` a few steps at a time."""

    def begin(self, workload: str, replan: bool, warm_up: int = 0) -> dict:
        """workload: "own", or a name of `load_traces`, which the routers are forced to follow. warm_up: steps before
        experts may move."""
        from megatron.core.rerun_state_machine import RerunDataIterator

        from hmoe_megatron.replan import replanner
        from hmoe_megatron.training import replanner as replanner_of

        trainer, self.moved, self.before_step = self.trainer, [], lambda *_: None
        trainer.data = RerunDataIterator(text_batches(trainer.args))
        trainer.layout.stats.timing = True
        if workload != "own":
            for module in unwrapped(trainer.model[0]).modules():
                if hasattr(module, "gating"):
                    force(module, workload, trainer)
        for _ in range(warm_up):
            trainer.step()
        trainer.layout.stats.take((), torch.device("cpu"))
        self._expert_ms()
        if replan:
            self.before_step = replanner_of(trainer.args, trainer.layout, None)
            change_plan = replanner.change_plan

            def noted(*given):
                self.moved.append(change_plan(*given))
                return self.moved[-1]

            replanner.change_plan = noted
        self.left_s = time.monotonic()
        return {}

    def train(self, count: int) -> dict:
        """Steps, and what moved before them.

        Of each step: milliseconds, of the look before it too; milliseconds in the experts of each rank and layer; by
        rows and widths the slowest rank over the mean, layer by layer. Of each change: seconds, bytes that each rank
        sent, and seconds for sending as many alone.
        """
        from hmoe_megatron.replan.decision import over_mean

        of = getattr(self.before_step, "__self__", None)
        if of and of.began_s:  # the run's clock stands still in the other side's turn
            of.began_s += time.monotonic() - self.left_s
        stats, steps, self.moved[:] = self.trainer.layout.stats, [], []
        for _ in range(count):
            self._wait()
            begun_s = time.perf_counter()
            self.before_step(self.trainer.iteration, self.trainer.model, self.trainer.optimizer)
            looked_s = time.perf_counter()
            loss, _ = self.trainer.step()
            self._wait()
            done_s = time.perf_counter()
            counts_LE, _, _ = stats.take((), torch.device("cpu"))
            steps.append(
                (looked_s - begun_s, done_s - looked_s, self._expert_ms(), counts_LE, self.trainer.layout.plan)
            )
        self.left_s = time.monotonic()
        by_rank = gathered([(step[2], step[3]) for step in steps])
        told = []
        for (look_s, step_s, _, _, plan), *ranks in zip(steps, *by_rank, strict=True):
            tokens_LE = sum(counts_LE for _, counts_LE in ranks)
            told.append(
                {
                    "look_ms": look_s * 1e3,
                    "ms": step_s * 1e3,
                    "expert_ms": [ms for ms, _ in ranks],
                    "by_rows": over_mean(plan, list(tokens_LE.numpy())),
                }
            )
        return {"steps": told, "changes": [self._change(moved) for moved in self.moved], "loss": loss}

    def _expert_ms(self) -> list[float]:
        """Of this rank in the last step, by layer. Of one micro-batch: forward in order, then backward."""
        intervals = self.trainer.layout.stats._intervals
        ms = [start.elapsed_time(end) for start, end in intervals]
        intervals.clear()
        half = len(ms) // 2
        return [forward + backward for forward, backward in zip(ms[:half], ms[half:][::-1], strict=True)]

    def _change(self, moved) -> dict:
        bytes_R = gathered(moved.sent_bytes)
        sent = torch.zeros(moved.sent_bytes // 4)
        received = torch.zeros((sum(bytes_R) - moved.sent_bytes) // 4)
        rank = torch.distributed.get_rank()
        numbers = [[0 if other == rank else part.numel() for other in range(2)] for part in (received, sent)]
        times = self._timed_ms(lambda: torch.distributed.all_to_all_single(received, sent, *numbers), SENDS)
        return {
            "s": max(gathered(moved.seconds)),
            "bytes": bytes_R,
            "sending_s": max(gathered(statistics.median(times))) / 1e3,
            "failure": moved.failure,
        }

    def save(self, directory: str) -> dict:
        """A checkpoint, and beside it the plan in force; seconds."""
        from megatron.training.checkpointing import save_checkpoint

        trainer, begun_s = self.trainer, time.perf_counter()
        trainer.args.save = directory
        save_checkpoint(trainer.iteration, trainer.model, trainer.optimizer, trainer.scheduler, 0)
        if torch.distributed.get_rank() == 0:
            trainer.layout.plan.save(Path(directory) / "new_plan.json")
        return {"s": time.perf_counter() - begun_s}


def gathered(value) -> list:
    """Of all ranks."""
    values = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(values, value)
    return values


def force(router, workload: str, trainer) -> None:
    """Every step the experts of this router get the rows that the trace says, on each rank: the logits get a bias."""
    args, gating = trainer.args, router.gating
    tokens, experts, topk = args.micro_batch_size * args.seq_length, args.num_experts, args.moe_router_topk
    rows_TE = trace(workload, TRACE_STEPS, experts, 2, (args.seed, router.layer), tokens, topk)

    def forced(hidden):
        logits = gating(hidden)
        rows_E = torch.from_numpy(rows_TE[trainer.iteration])
        order = torch.arange(experts).repeat_interleave(rows_E).view(topk, tokens)  # no expert twice in a column
        mixed = order[:, torch.randperm(tokens, generator=torch.Generator().manual_seed(trainer.iteration))]
        bias_TE = torch.zeros(tokens, experts).scatter(1, mixed.t(), CHOSEN)
        return logits + bias_TE.view(logits.shape).to(logits.dtype)

    router.gating = forced


def text_batches(args):
    """Endless micro-batches of bytes of this project's pages, other ones on each rank."""
    text = b"".join(path.read_bytes() for path in sorted((ROOT / "docs").glob("*.md")))
    data = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
    generator = torch.Generator().manual_seed(args.seed + torch.distributed.get_rank())
    while True:
        starts = torch.randint(0, len(data) - args.seq_length - 1, (args.micro_batch_size,), generator=generator)
        tokens_BS = torch.stack([data[start : start + args.seq_length + 1] for start in starts.tolist()])
        yield {
            "tokens": tokens_BS[:, :-1].contiguous(),
            "labels": tokens_BS[:, 1:].contiguous(),
            "loss_mask": torch.ones(args.micro_batch_size, args.seq_length),
            "position_ids": torch.arange(args.seq_length).expand(args.micro_batch_size, -1).contiguous(),
        }


if __name__ == "__main__":
    main(ReplanWorker)
