"""--use-checkpoint-args: the flags that describe a model, from the run that saved it."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from hmoe_megatron.checkpoint.settings import is_of_model
from hmoe_megatron.flag_files import last_value, run_arguments

_SWITCH, _LAYOUT_SWITCH = "--use-checkpoint-args", "--use-mp-args-from-checkpoint-args"
# What a model is made of, besides the settings that a resume compares.
_MORE = (
    "ffn_hidden_size moe_ffn_hidden_size seq_length max_position_embeddings hmoe_widths hmoe_total_width "
    "hmoe_width_multiple tokenizer_model vocab_file merge_file attention_dropout hidden_dropout"
).split()
_LAYOUT = (
    "tensor_model_parallel_size sequence_parallel pipeline_model_parallel_size expert_model_parallel_size "
    "expert_tensor_parallel_size context_parallel_size num_layers_per_virtual_pipeline_stage "
    "num_virtual_stages_per_pipeline_rank decoder_first_pipeline_num_layers decoder_last_pipeline_num_layers"
).split()


def with_checkpoint_flags(argv: Sequence[str]) -> list[str]:
    """``argv``; with --use-checkpoint-args preceded by the flags of the model that --load, or else
    --pretrained-checkpoint, holds, and with --use-mp-args-from-checkpoint-args those of its parallel layout.

    They come from run_arguments.json, untrusted: only flags of the model are taken, and parsed as if the user gave
    them. A flag of the user's own wins; one that contradicts the checkpoint is refused when settings are compared.
    Raises ValueError where that file is missing or is none.
    """
    switches = {_SWITCH, _LAYOUT_SWITCH} & {*argv}
    if not switches:
        return list(argv)
    root = last_value(argv, "--load") or last_value(argv, "--pretrained-checkpoint")
    if root is None:
        raise ValueError(f"{', '.join(sorted(switches))}: give --load or --pretrained-checkpoint")

    def is_taken(name: str) -> bool:
        of_model = _SWITCH in switches and (name in _MORE or is_of_model(name))
        return of_model or (_LAYOUT_SWITCH in switches and name in _LAYOUT)

    names, groups = _names(), _groups(run_arguments(Path(root)))
    taken = [word for group in groups if is_taken(names.get(group[0], "")) for word in group]
    return [*taken, *(word for word in argv if word not in switches)]


def _groups(argv: Sequence[str]) -> list[list[str]]:
    """Each flag with its values; --flag=value apart."""
    groups = []
    for word in argv:
        if word.startswith("--"):
            groups.append(word.split("=", 1))
        elif groups:
            groups[-1].append(word)
    return groups


def _names() -> dict[str, str]:
    """Flag -> attribute of the parsed arguments."""
    from megatron.training.arguments import add_megatron_arguments

    from hmoe_megatron.config import add_hmoe_arguments

    parser = add_hmoe_arguments(add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False)))
    return {flag: action.dest for action in parser._actions for flag in action.option_strings}
