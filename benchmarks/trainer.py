"""Training steps through Megatron's own set-up and train_step, of our model or of Megatron's MoE, without its loop.

For what compares steps: the benchmarks, and the tests that compare runs. Legend: B samples, S sequence length.
"""

import sys
import time

import torch

from hmoe_megatron import machine
from hmoe_megatron.nan_guard import guard as numeric_guard
from hmoe_megatron.training import model_config, parse_arguments, prepare, start_megatron


def configure(argv: list[str], stock: bool = False, guarded: bool = False):
    """(Megatron's arguments, made global; model config; config container) of a command line.

    stock: the flags are Megatron's own, and so is the MoE layer. guarded: with the guard of pretrain_hmoe.py.
    """
    from megatron.training.argument_utils import gpt_config_from_args, pretrain_cfg_container_from_args
    from megatron.training.arguments import parse_args, validate_args

    prepare()
    if stock:
        given, sys.argv = sys.argv, ["stock", *machine.machine_argv(argv)]
        try:
            args = parse_args()
        finally:
            sys.argv = given
        validate_args(args, {})
        layout = None
    else:
        args, layout, _ = parse_arguments(argv)
        if guarded:
            numeric_guard.install(layout.stats)
    start_megatron(args)
    config = gpt_config_from_args(args) if stock else model_config(args, layout)
    return args, config, pretrain_cfg_container_from_args(args, config), layout


class Trainer:
    """A model, its optimizer and its data; ``step`` trains once. One at a time in a process: ``close`` ends it, and so
    does a set-up that fails.

    batches: endless iterator of micro-batches, one for each model chunk; random tokens if it is not given. hooks: of
    Megatron's ``pre_wrap_hooks``, called with the model's chunks before they are wrapped.
    """

    def __init__(self, argv: list[str], stock: bool = False, guarded: bool = False, batches=None, hooks=()):
        try:
            self._set_up(argv, stock, guarded, batches or random_batches, hooks)
        except BaseException:
            self.close()
            raise

    def _set_up(self, argv, stock, guarded, batches, hooks):
        self.args, self.config, container, self.layout = configure(argv, stock, guarded)
        self.config.pre_wrap_hooks.extend(hooks)
        from megatron.core.distributed import finalize_model_grads
        from megatron.core.enums import ModelType
        from megatron.core.process_groups_config import ProcessGroupCollection
        from megatron.core.rerun_state_machine import RerunDataIterator
        from megatron.core.utils import get_model_config
        from megatron.training.initialize import initialize_megatron
        from megatron.training.training import setup_model_and_optimizer

        initialize_megatron()
        started_s = time.perf_counter()
        self.config.pre_wrap_hooks.append(lambda chunks: self._built(chunks, started_s))
        self.groups = ProcessGroupCollection.use_mpu_process_groups()
        self.model, self.optimizer, self.scheduler = setup_model_and_optimizer(
            ModelType.encoder_or_decoder, cfg_container=container, pg_collection=self.groups
        )
        self.model_config = get_model_config(self.model[0])
        self.model_config.grad_scale_func = self.optimizer.scale_loss
        self.model_config.finalize_model_grads_func = finalize_model_grads
        for chunk in self.model:
            chunk.train()
        iterators = [RerunDataIterator(batches(self.args)) for _ in self.model]
        self.data = iterators if len(iterators) > 1 else iterators[0]
        self.iteration = 0
        self._begin_overlap, self.end_overlap = _overlap(self.args, self.model, self.optimizer, self.model_config)

    def _built(self, chunks, started_s):
        """Notes how long Megatron took to build the model, before it wraps it."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.build_s = time.perf_counter() - started_s
        return chunks

    def step(self) -> tuple[float | None, float]:
        """(loss, on the ranks that have one; gradient norm) of one more step."""
        from megatron.core.pipeline_parallel import get_forward_backward_func
        from megatron.training import training

        from hmoe_megatron.data.batches import forward_step

        if self.iteration == 1:
            self._begin_overlap()
        out = training.train_step(
            forward_step,
            self.data,
            self.model,
            self.optimizer,
            self.scheduler,
            self.model_config,
            get_forward_backward_func(),
            iteration=self.iteration,
        )
        self.iteration += 1
        self.args.consumed_train_samples += self.args.global_batch_size
        return float(out[0]["lm loss"]) if out[0] else None, out[5]

    def close(self) -> None:
        """Forget the model and all that Megatron keeps of it, so that this process can train another."""
        from megatron.training.training import destroy_global_state

        self.model = self.optimizer = self.scheduler = self.config = self.layout = self.model_config = self.data = None
        self._begin_overlap = self.end_overlap = None
        destroy_global_state()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def random_batches(args, symbols: int | None = None):
    """Endless micro-batches of random tokens, [B, S], other ones on each data-parallel rank.

    symbols: so many different ones, all of the vocabulary if it is not given. Of few a model learns at once that there
    are no others.
    """
    from megatron.core import mpu

    shape = (args.micro_batch_size, args.seq_length + 1)
    generator = torch.Generator().manual_seed(args.seed + mpu.get_data_parallel_rank())
    seen = args.consumed_train_samples // (args.micro_batch_size * mpu.get_data_parallel_world_size())
    for _ in range(seen):  # of a run that goes on
        torch.randint(0, symbols or args.padded_vocab_size, shape, generator=generator)
    while True:
        tokens_BS = torch.randint(0, symbols or args.padded_vocab_size, shape, generator=generator)
        yield {
            "tokens": tokens_BS[:, :-1].contiguous(),
            "labels": tokens_BS[:, 1:].contiguous(),
            "loss_mask": torch.ones(args.micro_batch_size, args.seq_length),
            "position_ids": torch.arange(args.seq_length).expand(args.micro_batch_size, -1).contiguous(),
        }


def _overlap(args, model, optimizer, config):
    """Set the overlap of gradient reduction and parameter gathering up as Megatron's training loop does.

    Returns (to be called after the first step, after the last)."""
    from megatron.training import training

    def of_chunks(method):
        calls = [getattr(chunk, method) for chunk in model]
        return calls if len(calls) > 1 else calls[0]

    if args.overlap_grad_reduce:
        config.no_sync_func = of_chunks("no_sync")
        if args.align_grad_reduce:
            config.grad_sync_func = of_chunks("start_grad_sync")
    if not args.overlap_param_gather:
        return (lambda: None), (lambda: None)
    training.disable_forward_pre_hook(model, param_sync=False)

    def begin():
        training.enable_forward_pre_hook(model)
        config.param_sync_func = of_chunks("start_param_sync") if args.align_param_gather else None

    return begin, lambda: training.disable_forward_pre_hook(model, optimizer)
