"""A run's checkpoint as Megatron's model in one process, whatever layout trained it."""

from pathlib import Path

import torch

from hmoe_megatron.flag_files import run_arguments
from hmoe_megatron.training import model_config, open_checkpoints, parse_arguments, start_megatron

# One process holds the whole model, whatever layout trained it: checkpoints are by logical expert.
ONE_PROCESS = (
    "--tensor-model-parallel-size 1 --pipeline-model-parallel-size 1 --expert-model-parallel-size 1 "
    "--expert-tensor-parallel-size 1 --micro-batch-size 1 --global-batch-size 1 --train-iters 1 --eval-iters 0 "
    "--eval-interval 1 --lr 1e-4 --min-lr 0 --no-load-optim --no-load-rng --exit-on-missing-checkpoint "
    "--hmoe-placement auto"
).split()
# Flags of the run that make no sense there, dropped with their values.
DROPPED = (
    "--sequence-parallel --save --load --tensorboard-dir --use-distributed-optimizer --overlap-grad-reduce "
    "--lr-warmup-iters --lr-warmup-fraction --lr-warmup-init --lr-decay-iters --lr-wsd-decay-iters --lr-decay-style "
    "--overlap-param-gather --async-save --context-parallel-size --train-samples --lr-decay-samples "
    "--lr-warmup-samples --rampup-batch-size --num-layers-per-virtual-pipeline-stage "
    "--num-virtual-stages-per-pipeline-rank --pipeline-model-parallel-layout --decoder-first-pipeline-num-layers "
    "--decoder-last-pipeline-num-layers --hmoe-max-cuts"
).split()


def load_model(run_dir: Path, flags: list[str] = (), dropped: tuple[str, ...] = ()) -> torch.nn.Module:
    """The model of the last checkpoint in ``run_dir``, in evaluation mode; ``flags`` override those of the run, of
    which ``dropped`` are left out."""
    from megatron.training import checkpointing

    argv = [*without(run_arguments(run_dir), *DROPPED, *dropped), *ONE_PROCESS, "--load", str(run_dir), *flags]
    _, _, model = build_model(argv)
    checkpointing.load_checkpoint([model], None, None)
    return model.eval()


def build_model(argv: list[str]) -> tuple:
    """(Megatron's arguments, layout, the model with the weights it starts with) of flags for one process."""
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.training.initialize import initialize_megatron

    args, layout, start = parse_arguments(argv)
    open_checkpoints(args, layout, start)
    start_megatron(args)
    initialize_megatron()
    config = model_config(args, layout)
    (model,) = config.get_builder_cls()(config).build_distributed_models(
        ProcessGroupCollection.use_mpu_process_groups(), wrap_with_ddp=False
    )
    return args, layout, model


def without(argv: list[str], *flags: str) -> list[str]:
    """``argv`` less these flags and the values that follow them."""
    kept, dropping = [], False
    for word in argv:
        if word.startswith("--"):
            dropping = word.partition("=")[0] in flags
        if not dropping:
            kept.append(word)
    return kept
