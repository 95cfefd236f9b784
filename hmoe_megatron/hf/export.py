"""A checkpoint of pretrain_hmoe.py to a Hugging Face directory, a layer at a time on one CPU.

Whatever layout and plan saved it: tensors are read by logical expert, each put together from its pieces.
"""

import contextlib
import ctypes
import json
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import NamedTuple

import torch

from hmoe_megatron.files import atomic_directory
from hmoe_megatron.flag_files import last_value, run_arguments
from hmoe_megatron.hf import card, tokenizer_files
from hmoe_megatron.hf.architectures import Native
from hmoe_megatron.hf.checkpoint_tensors import CheckpointTensors
from hmoe_megatron.hf.forms import form_for
from hmoe_megatron.hf.model_settings import ModelSettings
from hmoe_megatron.hf.shards import ShardWriter, digest_of_all
from hmoe_megatron.hf.tensors import Part, listed, stored_parts

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
EXPORT_FILE = "hmoe_export.json"


class Exported(NamedTuple):
    """tensors, bytes: of the weights; digest: of all of them; model: what was exported; iteration: of the run;
    cost: parameters of the experts as they are stored, over their own. doubt: about the tokenizer, or None."""

    tensors: int
    bytes: int
    digest: str
    model: ModelSettings
    iteration: int
    cost: float
    doubt: str | None


def to_hf(
    root: Path,
    output: Path,
    *,
    form: str = "hmoe",
    iteration: int | None = None,
    dtype: str | None = None,
    tokenizer_model: str | None = None,
    skip_integrity: bool = False,
    check: Callable | None = None,
) -> Exported:
    """root: --save directory of a run. output: a directory that does not exist; it appears when it is whole.

    form: "hmoe", our own, or "mixtral", "qwen3_moe" or "deepseek_v3", padded. dtype: fp32 or bf16; None keeps the
    checkpoint's. tokenizer_model: where the run's tokenizer is now. check: called with (directory, model, iteration,
    flags of the run) before it gets its name; what it raises ends the export, what it returns, if anything, is in
    EXPORT_FILE.

    Raises ValueError with the list of what does not fit, CheckpointRefused for a damaged checkpoint; nothing is left.
    """
    with atomic_directory(output, "--output") as folder:
        flags = run_arguments(root) + (["--tokenizer-model", tokenizer_model] if tokenizer_model else [])
        rows = last_value(flags, "--padded-vocab-size")
        checkpoint = CheckpointTensors(root, iteration, skip_integrity, rows and int(rows))
        exported = _write(checkpoint, flags, folder, form, dtype)
        proof = check(folder, exported.model, exported.iteration, flags) if check else None
        if proof is not None:
            facts = json.loads((folder / EXPORT_FILE).read_text())
            write_json(folder / EXPORT_FILE, facts | {"logits": proof._asdict()})
    return exported


def _write(checkpoint: CheckpointTensors, flags: list[str], folder: Path, form: str, dtype: str | None) -> Exported:
    form = form_for(form, checkpoint.settings, checkpoint.shapes, flags)
    model = form.model
    parts = stored_parts(model, list(checkpoint.shapes))
    _check_shapes(checkpoint, parts)
    stored = {checkpoint.dtypes[key] for keyed in parts.values() for key, part in keyed if part.dtype is None}
    if dtype is None and len(stored) > 1:
        raise ValueError(f"{checkpoint.path}: tensors of {', '.join(map(str, stored))}; give --dtype")
    wanted = DTYPES[dtype] if dtype else next(iter(stored))
    tokens = tokenizer_files.write(flags, folder)
    writer = ShardWriter(folder, len(parts))
    for name, keyed in parts.items():
        _write_block(checkpoint, name, keyed, writer, form, wanted)
        _give_memory_back()
    writer.finish()
    write_json(folder / "config.json", form.config(str(wanted).removeprefix("torch."), tokens.ids))
    write_json(folder / "generation_config.json", tokens.generation_config(model.vocabulary_rows))
    for name in form.code:
        (folder / name).write_bytes((resources.files("hmoe_megatron.hf") / name).read_bytes())
    total = digest_of_all(writer.digests)
    write_json(
        folder / EXPORT_FILE,
        {
            "checkpoint_iteration": checkpoint.iteration,
            "sha256": total,
            "tensors": dict(sorted(writer.digests.items())),
        },
    )
    text = card.model_card(form, flags, checkpoint.iteration, writer.bytes, str(wanted), total)
    (folder / "README.md").write_text(text, encoding="utf-8")
    return Exported(len(writer.digests), writer.bytes, total, model, checkpoint.iteration, form.cost, tokens.doubt)


def _check_shapes(checkpoint: CheckpointTensors, parts: dict[str, list[tuple[str, Part]]]) -> None:
    wrong = [
        f"{key} is {list(checkpoint.shapes[key])}, not {list(part.shape)}"
        for keyed in parts.values()
        for key, part in keyed
        if checkpoint.shapes[key] != part.shape
    ]
    if wrong:
        raise ValueError(f"{checkpoint.path}: {listed(wrong, '; ')}; nothing was written")


def _write_block(
    checkpoint: CheckpointTensors,
    name: str,
    keyed: list[tuple[str, Part]],
    writer: ShardWriter,
    form: Native,
    dtype: torch.dtype,
) -> None:
    source = checkpoint.read([key for key, _ in keyed])
    bad = [key for key, tensor in source.items() if not tensor.isfinite().all()]
    if bad:
        raise ValueError(f"{checkpoint.path}: not finite: {', '.join(bad)}; give another with --ckpt-step")
    tensors = {}
    for key, part in keyed:
        for theirs, tensor in zip(part.names, part.split(source[key]), strict=True):
            tensors[form.name(theirs)] = form.pack(theirs, tensor.to(part.dtype or dtype))
        tensors |= {form.name(copy): tensors[form.name(part.names[0])].clone() for copy in part.copies}
    writer.write(tensors)
    for key, part in keyed:  # the way back from the disk must give what was read
        joined = part.join([form.unpack(theirs, writer.read_back(form.name(theirs))) for theirs in part.names])
        copies = [writer.read_back(form.name(copy)) for copy in part.copies]
        expected = source[key].to(part.dtype or dtype)
        if not all(torch.equal(found, expected) for found in (joined, *copies)):
            raise OSError(f"{name}: {key} on the disk is not what was written; nothing is left")


def _give_memory_back() -> None:
    """glibc keeps what was freed between what was not: a layer's worth after some layers."""
    with contextlib.suppress(AttributeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


def write_json(path: Path, value) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")
