"""Training runs on GPUs, as data, and the process that does many of them one after the other.

    python -m benchmarks.gpu.runs serve      what duel.Side starts, one a rank; answers {"do": "run", "name": NAME}

A process takes 30 to 70 s to its first step, most of it imports: so one does all runs for as many GPUs. The tests
marked ``gpu`` are these runs too, and a test without a GPU checks that their flags are taken.
"""

import dataclasses
import functools
import importlib.util
import json
import math
import os
import resource
import shutil
import sys
import tempfile
import traceback

# Heads of 64 and sizes that divide by FP8's tiles.
MODEL = (
    "--num-layers 2 --hidden-size 256 --num-attention-heads 4 --seq-length 128 --max-position-embeddings 128 "
    "--position-embedding-type rope --swiglu --disable-bias-linear --normalization RMSNorm "
    "--untie-embeddings-and-output-weights --num-experts 4 --moe-router-topk 2 --hidden-dropout 0 "
    "--attention-dropout 0 --micro-batch-size 2 --global-batch-size 8 --lr 1e-3 --min-lr 1e-3 "
    "--lr-decay-style constant --train-iters 1000 --seed 1234 --mock-data --tokenizer-type NullTokenizer "
    "--vocab-size 512 --make-vocab-size-divisible-by 1 --log-interval 1 --eval-interval 1000 --eval-iters 0 "
    "--dist-ckpt-optim-fully-reshardable --hmoe-widths 64,128,192,256"
)
LOCAL, TE = "--transformer-impl local", "--transformer-impl transformer_engine"
TOPP = "--hmoe-router topp --hmoe-top-p 0.6"
EP2 = "--expert-model-parallel-size 2"
FLEX = f"{LOCAL} {EP2} --bf16 --moe-token-dispatcher-type flex --moe-flex-dispatcher-backend"
ALLTOALL = f"{LOCAL} {EP2} --bf16 --moe-token-dispatcher-type alltoall"
FP8 = f"{TE} --bf16 --fp8-format hybrid"
TP2 = "--tensor-model-parallel-size 2 --sequence-parallel"
OVERLAPPED = "--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather"
STEPS, SAVED = 12, 5
# Relative, the largest over the steps. Guesses: nobody has run them. A run prints how far apart it was, and twice the
# same run how far apart two are: set them from that.
FP32_BOUND, BF16_BOUND, FP8_BOUND = 1e-3, 1e-2, 5e-2


@dataclasses.dataclass(frozen=True)
class Run:
    """flags and against: of two runs whose losses are compared; no against: the losses must fall. resume: go on from
    the fifth step's checkpoint, compared with the run unbroken. engine: needs Transformer Engine. needs: modules."""

    name: str
    gpus: int
    flags: str
    against: str | None = None
    against_gpus: int = 1
    bound: float = BF16_BOUND
    engine: bool = False
    needs: tuple[str, ...] = ()
    capability: tuple[int, int] = (0, 0)
    resume: bool = False


_DEEPEP = ("deep_ep",)
# In the order of their value: a run that is cut off has done the first.
RUNS = (
    Run("no flag", 1, ""),
    Run(
        "triton against reference, bf16", 1, "--bf16 --hmoe-gemm-backend triton", "--bf16 --hmoe-gemm-backend reference"
    ),
    Run("the same twice", 1, "--bf16", "--bf16"),
    Run("TE against local", 1, f"{TE} --bf16", f"{LOCAL} --bf16", engine=True),
    Run("FP8", 1, FP8, f"{TE} --bf16", bound=FP8_BOUND, engine=True, capability=(8, 9)),
    Run("resumed, distributed optimizer in many buckets", 1, f"--bf16 {OVERLAPPED} --ddp-bucket-size 1", resume=True),
    Run("TE, Top-P", 1, f"{TE} {TOPP} --bf16", engine=True),
    Run("local, Top-P", 1, f"{LOCAL} {TOPP} --bf16"),
    Run("distributed optimizer", 1, f"--bf16 {OVERLAPPED}", "--bf16"),
    Run("resumed, bf16", 1, "--bf16", resume=True),
    Run("experts recomputed", 1, "--bf16 --recompute-granularity selective --recompute-modules moe", "--bf16"),
    Run(
        "FP8, recomputed",
        1,
        f"{FP8} --recompute-granularity selective --recompute-modules moe",
        FP8,
        engine=True,
        capability=(8, 9),
    ),
    Run("resumed", 1, "", resume=True, bound=FP32_BOUND),
    Run("triton against reference", 1, "--hmoe-gemm-backend triton", "--hmoe-gemm-backend reference", bound=FP32_BOUND),
    Run("resumed, local", 1, f"{LOCAL} --bf16", resume=True, engine=True),
    Run("EP2", 2, EP2, "", bound=FP32_BOUND),
    Run("EP2, distributed optimizer", 2, f"--bf16 {EP2} {OVERLAPPED}", "--bf16"),
    Run("TP2", 2, TP2, "", bound=FP32_BOUND),
    Run("PP2", 2, "--pipeline-model-parallel-size 2", "", bound=FP32_BOUND),
    Run("CP2", 2, f"{TE} --bf16 --context-parallel-size 2", f"{TE} --bf16", engine=True),
    Run(
        "CP2, EP2, Top-P", 2, f"{TE} {TOPP} {EP2} --bf16 --context-parallel-size 2", f"{TE} {TOPP} --bf16", engine=True
    ),
    Run("flex, DeepEP", 2, f"{FLEX} deepep", ALLTOALL, 2, needs=_DEEPEP),
    Run("flex, DeepEP, Top-P", 2, f"{FLEX} deepep {TOPP}", f"{ALLTOALL} {TOPP}", 2, needs=_DEEPEP),
    Run("flex, HybridEP", 2, f"{FLEX} hybridep", ALLTOALL, 2, needs=_DEEPEP),
    Run("flex, HybridEP, Top-P", 2, f"{FLEX} hybridep {TOPP}", f"{ALLTOALL} {TOPP}", 2, needs=_DEEPEP),
)


def lacking(run: Run, gpus: int, capability: tuple[int, int], engine: bool) -> str | None:
    """What of a machine with these GPUs, and with or without a whole Transformer Engine, the run would need."""
    if run.engine and not engine:
        return "needs Transformer Engine"
    for module in run.needs:
        if not importlib.util.find_spec(module):
            return f"needs {module}"
    if gpus < run.gpus:
        return f"needs {run.gpus} GPUs, this machine has {gpus}"
    if capability < run.capability:
        return f"needs compute capability {run.capability[0]}.{run.capability[1]}"
    return None


def apart(found, expected) -> float:
    """Largest relative difference of two runs' losses."""
    return max(abs(a - b) / abs(b) for a, b in zip(found, expected, strict=True))


class Server:
    """Does runs in this process, and in those of ``control``, a group of all ranks. Losses of a set of flags are kept:
    many runs are compared with the same one."""

    def __init__(self, control, model: str = MODEL, steps: int = STEPS):
        self.control, self.model, self.steps, self._losses = control, model, steps, {}

    def run(self, flags: str, resume: bool = False, again: bool = False) -> dict:
        """{"losses"} of ``flags``, and with ``resume`` {"resumed"}: those after the checkpoint; or {"failed"}. again:
        train also where the losses are known."""
        try:
            if again or flags not in self._losses:
                self._losses[flags] = self._train(flags.split(), self.steps)
            found = {"losses": self._losses[flags]}
            return found | {"resumed": self._resumed(flags.split())} if resume else found
        except (Exception, SystemExit) as error:  # SystemExit: a flag that Megatron's parser does not know
            last = traceback.extract_tb(error.__traceback__)[-1]
            said = str(error).strip().splitlines()
            return {"failed": f"{type(error).__name__}: {said[0] if said else ''} ({last.filename}:{last.lineno})"}

    def _train(self, flags, steps, save=False):
        import torch

        from benchmarks.trainer import Trainer, random_batches

        # Few symbols: in a dozen steps the loss falls for certain.
        trainer = Trainer([*self.model.split(), *flags], batches=functools.partial(random_batches, symbols=16))
        try:
            losses = [trainer.step()[0] for _ in range(steps)]
            if save:
                from megatron.training.checkpointing import save_checkpoint

                save_checkpoint(trainer.iteration, trainer.model, trainer.optimizer, trainer.scheduler, 0)
        finally:
            trainer.close()
        of_ranks = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(of_ranks, losses, group=self.control)
        return next(of_rank for of_rank in of_ranks if of_rank[0] is not None)  # the last pipeline stage has them

    def _resumed(self, flags):
        import torch

        folder = [tempfile.mkdtemp(prefix="gpu-run-") if torch.distributed.get_rank() == 0 else None]
        torch.distributed.broadcast_object_list(folder, 0, group=self.control)
        try:
            self._train([*flags, "--save", folder[0], "--save-interval", "1000"], SAVED, save=True)
            return self._train([*flags, "--load", folder[0]], self.steps - SAVED)
        finally:
            torch.distributed.barrier(group=self.control)
            shutil.rmtree(folder[0], ignore_errors=True)


def verdict(run: Run, found: dict, against: dict | None) -> dict:
    """What of a run is emitted: ``ok``, and how far apart it was or why it failed."""
    if "failed" in found or (against and "failed" in against):
        return {"ok": False, "failed": found.get("failed") or f"what it is compared with: {against['failed']}"}
    losses = found["losses"]
    if not all(map(math.isfinite, losses)):
        return {"ok": False, "failed": f"losses {losses}"}
    if run.resume:
        distance = apart(found["resumed"], losses[SAVED:])
    elif against:
        distance = apart(losses, against["losses"])
    else:
        return {"ok": losses[-1] < losses[0], "first": losses[0], "last": losses[-1]}
    return {"ok": distance <= run.bound, "apart": distance, "bound": run.bound, "last": losses[-1]}


def serve(model: str = MODEL, steps: int = STEPS) -> None:
    """Answers on standard output, a JSON line each; see benchmarks/worker.py."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    from hmoe_megatron import machine

    machine.prepare_environment()
    import torch

    from hmoe_megatron.training import prepare

    prepare()
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    torch.distributed.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    control = torch.distributed.new_group(backend="gloo")
    # Megatron's data loaders and checkpoints leave descriptors open.
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    server, first = Server(control, model, steps), torch.distributed.get_rank() == 0
    answer = {"ready_s": 0.0}
    while True:
        if first:
            print(json.dumps(answer), file=answers, flush=True)
        if "failed" in answer and torch.cuda.is_available():
            torch.cuda.synchronize()  # raises after an illegal access, which stays: the next run needs a new process
        line = [sys.stdin.readline() if first else None]
        torch.distributed.broadcast_object_list(line, 0, group=control)
        if not line[0]:
            return
        asked = json.loads(line[0])
        asked.pop("do")
        answer = server.run(**asked)


if __name__ == "__main__":
    serve()
