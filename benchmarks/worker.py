"""One side of a comparison: a process, or one a rank, that holds a model and does what it is asked on standard input.

    python -m benchmarks.worker ours|stock FLAGS      ranks by RANK, WORLD_SIZE, MASTER_PORT; what duel.Side starts

The first answer comes when all is imported, and the first line to it must be {"do": "build"}; then a JSON line
{"do": NAME, ...} is answered by one. Megatron's own prints go to standard error. See ``Worker`` for NAMEs.
"""

import json
import os
import sys
import time

import psutil
import torch

from benchmarks.step_parts import StepParts, kernels


class Worker:
    """What a side can do. Times are milliseconds: of this thread for what runs on one CPU core, else of the clock."""

    def __init__(self, trainer, stock: bool):
        self.trainer, self.stock = trainer, stock
        self.on_gpu = torch.cuda.is_available()
        self.ranks = torch.distributed.get_world_size()
        self.layer = next(
            layer.mlp for layer in unwrapped(trainer.model[0]).decoder.layers if hasattr(layer.mlp, "experts")
        )

    def _timed_ms(self, run, count: int) -> list[float]:
        clock = time.perf_counter if self.on_gpu or self.ranks > 1 else time.thread_time
        times = []
        for _ in range(count):
            self._wait()
            start = clock()
            run()
            self._wait()
            times.append((clock() - start) * 1e3)
        return times

    def _wait(self):
        if self.on_gpu:
            torch.cuda.synchronize()
        if self.ranks > 1:
            torch.distributed.barrier()

    def step(self, count: int) -> dict:
        """Training steps; losses beside their times."""
        losses = []
        times = self._timed_ms(lambda: losses.append(self.trainer.step()[0]), count)
        return {"ms": times, "losses": losses}

    def parts(self, count: int) -> dict:
        """Milliseconds of a step's parts, mean over ``count`` steps, and of the whole."""
        with StepParts(unwrapped(self.trainer.model[0]), self.trainer.optimizer) as parts:
            whole = sum(self._timed_ms(self.trainer.step, count))
            ms = {part: of / count for part, of in parts.ms().items()}
        return {"parts_ms": ms | {"rest": whole / count - sum(ms.values())}, "step_ms": whole / count}

    def kernels(self) -> dict:
        """The kernels that take most of a step."""
        return {"kernels": kernels(self.trainer.step)}

    def experts_a_token(self) -> dict:
        """Mean number of experts that tokens chose since the last call."""
        counts_LE, tokens_L, _ = self.trainer.layout.stats.take((), "cuda" if self.on_gpu else "cpu")
        return {"experts": float(counts_LE.sum() / tokens_L.sum())}

    def memory(self) -> dict:
        """Most bytes of the device so far."""
        return {"bytes": torch.cuda.max_memory_allocated() if self.on_gpu else 0}

    def moe_layer(self, count: int, tokens: int) -> dict:
        """Forward and backward passes of the first MoE layer, router and dispatch included."""
        config = self.trainer.model_config
        x = self._draw(tokens, 1, config.hidden_size).requires_grad_()
        dy = self._draw(tokens, 1, config.hidden_size)

        def run():
            self.layer(x)[0].backward(dy)
            x.grad = None

        return {"ms": self._timed_ms(run, count)}

    def experts(self, count: int, rows: int) -> dict:
        """The same of its experts alone, ``rows`` of each."""
        config, held = self.trainer.model_config, self._held()
        x = self._draw(rows * held, config.hidden_size).requires_grad_()
        dy = self._draw(rows * held, config.hidden_size)
        probs = torch.rand(rows * held, device=x.device).requires_grad_()
        rows_E = torch.tensor([rows] * held)

        def run():
            self.layer.experts(x, rows_E, probs)[0].backward(dy)
            x.grad = probs.grad = None

        return {"ms": self._timed_ms(run, count)}

    def dense(self, count: int, rows: int) -> dict:
        """One dense FFN of as many rows and FLOPs as ``experts``: of the mean width."""
        config, held = self.trainer.model_config, self._held()
        width = round(sum(p.numel() for p in self.layer.experts.parameters()) / 3 / config.hidden_size / held)
        x = self._draw(rows * held, config.hidden_size).requires_grad_()
        dy = self._draw(rows * held, config.hidden_size)
        fc1, fc2 = self._draw(2 * width, config.hidden_size), self._draw(config.hidden_size, width)
        weights = [weight.mul_(0.02).requires_grad_() for weight in (fc1, fc2)]

        def run():
            gate, up = torch.nn.functional.linear(x, fc1).chunk(2, dim=-1)
            torch.nn.functional.linear(torch.nn.functional.silu(gate) * up, fc2).backward(dy)
            for tensor in (x, *weights):
                tensor.grad = None

        return {"ms": self._timed_ms(run, count)}

    def _held(self) -> int:
        """Experts of this rank."""
        experts = self.layer.experts
        return experts.num_local_experts if self.stock else len(experts.pieces)

    def _draw(self, *shape):
        device = torch.device("cuda", torch.cuda.current_device()) if self.on_gpu else torch.device("cpu")
        return torch.randn(shape, device=device, dtype=self.trainer.model_config.params_dtype)


def unwrapped(model):
    """The model inside Megatron's wrappers."""
    from megatron.core.utils import unwrap_model

    return unwrap_model(model)


def pin() -> None:
    """A rank of a CPU run has one core, the same in both sides of a comparison."""
    if not torch.cuda.is_available():
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[int(os.environ.get("LOCAL_RANK", "0")) % len(cores)]})
        torch.set_num_threads(1)


def build(side: str, flags: list[str], kind: type[Worker]) -> tuple[Worker, dict]:
    """The worker, and what is answered: seconds of building the model and of all its set-up, and its parameters."""
    from benchmarks.trainer import Trainer

    begun = time.perf_counter()
    worker = kind(Trainer(flags, stock=side == "stock", guarded=True), side == "stock")
    return worker, {
        "build_s": worker.trainer.build_s,
        "set_up_s": time.perf_counter() - begun,
        "expert_parameters": sum(p.numel() for p in worker.layer.experts.parameters()),
    }


def main(kind: type[Worker] = Worker) -> None:
    side, *flags = sys.argv[1:]
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    from hmoe_megatron import machine

    machine.prepare_environment()
    pin()
    from hmoe_megatron.training import prepare

    prepare()
    import megatron.training.training  # noqa: F401

    first = os.environ["RANK"] == "0"

    def say(answer):
        if first:
            print(json.dumps(answer), file=answers, flush=True)

    say({"ready_s": time.time() - psutil.Process().create_time()})
    if first and not sys.stdin.readline():  # the first that is asked for is to build; the other ranks wait for this one
        return
    worker, built = build(side, flags, kind)
    say(built)
    control = torch.distributed.new_group(backend="gloo") if worker.ranks > 1 else None
    while True:
        line = [sys.stdin.readline() if first else None]
        if control is not None:
            torch.distributed.broadcast_object_list(line, 0, group=control)
        if not line[0]:
            return
        asked = json.loads(line[0])
        say(getattr(worker, asked.pop("do"))(**asked))


if __name__ == "__main__":
    main()
