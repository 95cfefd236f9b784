"""Text from a training run's checkpoint, in one process.

Legend: T tokens of the context, V vocabulary.
"""

from pathlib import Path

import torch

from hmoe_megatron.flag_files import run_arguments
from hmoe_megatron.training import model_config, open_checkpoints, parse_arguments

# One process holds the whole model, whatever layout trained it: checkpoints are by logical expert.
ONE_PROCESS = (
    "--tensor-model-parallel-size 1 --pipeline-model-parallel-size 1 --expert-model-parallel-size 1 "
    "--expert-tensor-parallel-size 1 --micro-batch-size 1 --global-batch-size 1 --train-iters 1 --eval-iters 0 "
    "--eval-interval 1 --no-load-optim --no-load-rng --exit-on-missing-checkpoint --hmoe-placement auto"
).split()
# Flags of the run that make no sense there, dropped with their values.
DROPPED = (
    "--sequence-parallel --save --load --tensorboard-dir --use-distributed-optimizer --overlap-grad-reduce "
    "--overlap-param-gather --async-save --context-parallel-size --train-samples --lr-decay-samples "
    "--lr-warmup-samples --rampup-batch-size --num-layers-per-virtual-pipeline-stage "
    "--num-virtual-stages-per-pipeline-rank --pipeline-model-parallel-layout --decoder-first-pipeline-num-layers "
    "--decoder-last-pipeline-num-layers --hmoe-max-cuts"
).split()


def load_model(run_dir: Path, flags: list[str] = (), dropped: tuple[str, ...] = ()) -> torch.nn.Module:
    """The model of the last checkpoint in ``run_dir``, in evaluation mode; ``flags`` override those of the run, of
    which ``dropped`` are left out."""
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.training import checkpointing
    from megatron.training.global_vars import set_global_variables
    from megatron.training.initialize import initialize_megatron

    argv = [*without(run_arguments(run_dir), *DROPPED, *dropped), *ONE_PROCESS, "--load", str(run_dir), *flags]
    args, layout = parse_arguments(argv)
    open_checkpoints(args, layout)
    set_global_variables(args)
    initialize_megatron()
    config = model_config(args, layout)
    models = config.get_builder_cls()(config).build_distributed_models(
        ProcessGroupCollection.use_mpu_process_groups(), wrap_with_ddp=False
    )
    checkpointing.load_checkpoint(models, None, None)
    return models[0].eval()


def without(argv: list[str], *flags: str) -> list[str]:
    """``argv`` less these flags and the values that follow them."""
    kept, dropping = [], False
    for word in argv:
        if word.startswith("--"):
            dropping = word.partition("=")[0] in flags
        if not dropping:
            kept.append(word)
    return kept


@torch.no_grad()
def generate(
    model: torch.nn.Module,
    prompt_T: list[int],
    count: int,
    *,
    context: int,
    vocabulary: int,
    temperature: float = 0.8,
    seed: int = 0,
) -> list[int]:
    """``count`` tokens after ``prompt_T``, which must not be empty; drawn at ``temperature``, 0 takes the likeliest.

    context: most tokens the model may see. vocabulary: ids from here on are padding and never drawn.
    """
    generator = torch.Generator().manual_seed(seed)
    tokens = list(prompt_T)
    for _ in range(count):
        window = torch.tensor([tokens[-context:]], device=torch.cuda.current_device())
        positions = torch.arange(window.shape[1], device=window.device).unsqueeze(0)
        logits_V = model(window, positions, None)[0, -1, :vocabulary].float().cpu()
        if temperature:
            probabilities_V = torch.softmax(logits_V / temperature, dim=-1)
            token = int(torch.multinomial(probabilities_V, 1, generator=generator))
        else:
            token = int(logits_V.argmax())
        tokens.append(token)
    return tokens[len(prompt_T) :]
