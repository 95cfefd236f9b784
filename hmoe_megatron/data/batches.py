"""Batches, loss and datasets, on megatron.core.datasets.

Every tensor-parallel rank builds the loaders itself (Megatron's ``is_distributed`` providers): samples depend on the
data-parallel rank only, so all ranks of a tensor-parallel group read the same batch and none is broadcast.
Legend: B samples of a micro-batch, S sequence length.
"""

import pickle
import time
from functools import partial

import torch
from megatron.core import mpu
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig, MockGPTDataset
from megatron.core.rerun_state_machine import get_rerun_state_machine
from megatron.core.utils import get_attr_wrapped_model, get_batch_on_this_cp_rank
from megatron.training import get_args, get_timers, get_tokenizer
from megatron.training.utils.common_utils import get_blend_and_blend_per_split, is_first_or_last_pipeline_stage

from hmoe_megatron import collectives
from hmoe_megatron.data.checks import verify_data
from hmoe_megatron.data.conversations import Conversations, mask_of
from hmoe_megatron.exits import DataRefused

SPIKY_LOSS_FACTOR = 10.0  # Megatron's: of the largest loss seen
BATCH_KEYS = ("tokens", "labels", "loss_mask", "position_ids", "attention_mask")


def get_batch(data_iterator, vp_stage=None) -> dict[str, torch.Tensor | None]:
    """Next micro-batch of this rank, [B, S] each; all None on pipeline stages that need none."""
    if not is_first_or_last_pipeline_stage(vp_stage):
        return dict.fromkeys(BATCH_KEYS)
    sample = next(data_iterator)
    device = torch.cuda.current_device()
    batch = {key: sample[key].to(device, non_blocking=True) if key in sample else None for key in BATCH_KEYS}
    if "cu_seqlens" in sample:
        batch["attention_mask"] = mask_of(sample["cu_seqlens"].to(device), batch["tokens"].shape[1])
    if get_args().context_parallel_size > 1:
        sliced = get_batch_on_this_cp_rank(
            {**batch, "cu_seqlens": None}, is_hybrid_cp=False, cp_group=mpu.get_context_parallel_group()
        )
        batch = {key: sliced[key] for key in BATCH_KEYS}
    return batch


def loss_func(loss_mask_BS: torch.Tensor, losses_BS: torch.Tensor):
    """(sum of the losses of the counted tokens, their number, the pair to be averaged and logged)."""
    mask = loss_mask_BS.view(-1).float()
    loss = (losses_BS.view(-1).float() * mask).sum()
    _validate(loss)
    num_tokens = mask.sum().to(torch.int)
    return loss, num_tokens, {"lm loss": torch.stack((loss.detach(), num_tokens.to(loss.dtype)))}


def _validate(loss: torch.Tensor) -> None:
    """Megatron's checks of a micro-batch's loss, where its flags ask for them; each reads the loss."""
    args, rerun = get_args(), get_rerun_state_machine()
    if args.check_for_nan_in_loss_and_grad:
        for rejected, what in ((torch.isnan, "NaN"), (torch.isinf, "infinity")):
            rerun.validate_result(loss, rejected, f"found {what} in the local loss", tolerance=0.0, fatal=True)
    if args.check_for_spiky_loss:
        spiky = partial(rerun.is_unexpectedly_large, threshold=SPIKY_LOSS_FACTOR, context="loss")
        rerun.validate_result(loss, spiky, "found a spiky loss", tolerance=0.0, fatal=False)


def forward_step(data_iterator, model, return_schedule_plan: bool = False):
    """One micro-batch through ``model``: its output and the loss function, as Megatron's schedules want them.
    return_schedule_plan: what would be computed in place of the output, for --overlap-moe-expert-parallel-comm."""
    timers = get_timers()
    timers("batch-generator", log_level=2).start()
    batch = get_batch(data_iterator, get_attr_wrapped_model(model, "vp_stage"))
    timers("batch-generator").stop()
    loss_mask_BS = batch["loss_mask"]
    compute = get_attr_wrapped_model(model, "build_schedule_plan") if return_schedule_plan else model
    output = compute(
        batch["tokens"], batch["position_ids"], batch["attention_mask"], labels=batch["labels"], loss_mask=loss_mask_BS
    )
    return output, lambda losses_BS: loss_func(loss_mask_BS, losses_BS)


def dataset_config(args) -> GPTDatasetConfig:
    """Dataset settings from Megatron's data flags."""
    blend, blend_per_split = get_blend_and_blend_per_split(args)
    return GPTDatasetConfig(
        random_seed=args.seed,
        sequence_length=args.seq_length,
        context_parallel_size=args.context_parallel_size,
        blend=blend,
        blend_per_split=blend_per_split,
        split=args.split,
        multiple_validation_sets=args.multiple_validation_sets,
        full_validation=args.full_validation,
        num_dataset_builder_threads=args.num_dataset_builder_threads,
        path_to_cache=args.data_cache_path,
        mmap_bin_files=args.mmap_bin_files,
        tokenizer=get_tokenizer(),
        reset_position_ids=args.reset_position_ids,
        reset_attention_mask=args.reset_attention_mask,
        eod_mask_loss=args.eod_mask_loss,
        # Attention is causal without a mask; a mask is built only where documents must not see each other.
        create_attention_mask=args.reset_attention_mask,
        mid_level_dataset_surplus=args.mid_level_dataset_surplus,
        allow_ambiguous_pad_tokens=args.allow_ambiguous_pad_tokens,
        object_storage_cache_path=args.object_storage_cache_path,
        fast_cache_load=args.dataloader_fast_cache_load,
        defer_npy_index_mmap=args.dataloader_defer_npy_index_mmap,
    )


def leave_out_unread(config: GPTDatasetConfig, num_samples) -> None:
    """Build nothing for a split of which no sample is wanted: Megatron's blends assert that one is, and a split without
    documents is counted for ever."""
    for splits in filter(None, (config.split_matrix, config.blend_per_split)):
        splits[:] = [None if wanted == 0 else split for split, wanted in zip(splits, num_samples, strict=True)]


def datasets_provider(num_samples, vp_stage=None):
    """(train, validation, test) datasets of at least ``num_samples`` each (Megatron's provider interface).

    Raises DataRefused on the rank that can't read them. Megatron unpickles nothing but arrays from a cached index.
    """
    args = get_args()
    if args.hmoe_verify_data and not vp_stage:  # once, not for every virtual pipeline stage
        _verify(args)
    dataset, config = MockGPTDataset if args.mock_data else GPTDataset, dataset_config(args)
    if args.sft:
        dataset = Conversations
    leave_out_unread(config, num_samples)
    builder = BlendedMegatronDatasetBuilder(
        dataset, num_samples, lambda: is_first_or_last_pipeline_stage(vp_stage), config
    )
    try:
        return builder.build()
    except (EOFError, OSError, ValueError, pickle.UnpicklingError) as error:
        cache = args.data_cache_path or "the directory cache/ beside the data (--data-cache-path)"
        raise DataRefused(
            f"datasets can't be read: {error!s:.300}: repair the data, or remove {cache} if its index is "
            "damaged: it is made again",
            on_every_rank=False,
        ) from None


def _verify(args) -> None:
    """Raises DataRefused on all ranks if one found a file that is not what its sidecar says."""
    started_s = time.monotonic()
    try:
        collectives.all_ranks(lambda: verify_data(args, collectives.rank(), collectives.world_size()))
    except collectives.StepFailed as error:
        raise DataRefused(str(error).replace("ValueError: ", "")) from None
    if collectives.rank() == 0:
        print(f" data: SHA-256 of all files compared in {time.monotonic() - started_s:.1f} s", flush=True)


datasets_provider.is_distributed = True
