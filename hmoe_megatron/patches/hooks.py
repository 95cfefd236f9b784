"""Where the run's own code goes into Megatron's: its modules look these names up and offer no seam for them.

The features call these with what is theirs; nothing here knows them.
"""

import functools

from hmoe_megatron.patches.registry import around, around_method, patch, replace


@patch("hook")
def optimizer_is_built(then):
    """The gradient norm by logical expert is attached to the optimizer that Megatron's training builds.

    then(optimizer, model chunks)."""
    from megatron.training import training

    def get_megatron_optimizer(stock, config, model_chunks, *args, **named):
        optimizer = stock(config, model_chunks, *args, **named)
        then(optimizer, model_chunks)
        return optimizer

    around(training, "get_megatron_optimizer", get_megatron_optimizer)


@patch("hook")
def multi_token_prediction(with_experts):
    """Megatron builds multi-token-prediction layers from its own specs of decoder layers, not from those of the model,
    and so with equal experts.

    with_experts(spec of the block of these layers or None, the model's decoder block spec)."""
    from megatron.training.models import gpt

    def mtp_block_spec(stock, config, transformer_layer_spec, *args, **named):
        return with_experts(stock(config, transformer_layer_spec, *args, **named), transformer_layer_spec)

    around(gpt, "mtp_block_spec", mtp_block_spec)


@patch("hook")
def reports_of_flops_and_memory(flops_seen, memory_seen):
    """Megatron's reports read one width and one number of experts a token in the middle of their functions.

    flops_seen, memory_seen: Megatron's arguments -> those that the report is to see."""
    from megatron.training import training

    def seen_by(change):
        return lambda stock, args, *more, **named: stock(change(args), *more, **named)

    around(training, "num_floating_point_operations", seen_by(flops_seen))
    around(training, "report_theoretical_memory", seen_by(memory_seen))


@patch("hook")
def training_step(machine, step):
    """Megatron saves a checkpoint in the middle of a bad step and exits 16 at every resume on the same GPU.

    machine: class in place of RerunStateMachine; step(stock train_step, its arguments)."""
    from megatron.core import rerun_state_machine
    from megatron.training import training

    replace(rerun_state_machine, "RerunStateMachine", machine)
    around(training, "train_step", step)


@patch("hook")
def checkpoints(saver, load_checkpoint, reader, hashing_request, write_or_raise, finalize_together):
    """Megatron writes a checkpoint into its place as it goes, unhashed, and its tracker by truncating it; it reads
    shards with pickle. See checkpoint/: saver is a saving.Saver, reader makes a checked reader."""
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.strategies import filesystem_async, state_dict_saver
    from megatron.core.dist_checkpointing.strategies import torch as strategies
    from megatron.training import async_utils, checkpointing, training  # noqa: F401  it takes them by name

    around(checkpointing, "save_checkpoint", saver.save_checkpoint)
    around(checkpointing, "load_checkpoint", load_checkpoint)
    around(async_utils, "maybe_finalize_async_save", saver.finalize)
    around(dist_checkpointing, "save", saver.write)
    around(dist_checkpointing.core, "save_config", saver.write_config)
    around(state_dict_saver, "save_state_dict_async_finalize", finalize_together)
    around_method(strategies.TorchDistSaveShardedStrategy, "async_save", hashing_request)
    writer = filesystem_async.FileSystemWriterAsync
    replace(
        writer, "write_preloaded_data", staticmethod(functools.partial(write_or_raise, writer.write_preloaded_data))
    )
    replace(strategies, "_get_filesystem_reader", reader)
    # Megatron truncates the tracker before it writes it. Its `open` in this one module is ours.
    replace(checkpointing, "maybe_msc", _Opener(checkpointing.maybe_msc, saver.open_tracker))


class _Opener:
    """`original` with another `open`."""

    def __init__(self, original, opener):
        self._original, self._opener = original, opener

    def __getattr__(self, name):
        stock = getattr(self._original, name)
        return functools.partial(self._opener, stock) if name == "open" else stock


@patch("hook", each=True)
def unpadded_flex_dispatcher(dispatcher, config):
    """Megatron's flex dispatchers pad an expert's rows to the tiles of FP8 kernels under --fp8-format, which the
    experts here don't use. The communication manager takes no config of its own."""
    replace(dispatcher._comm_manager, "config", config)
