"""Single tensors of a Megatron checkpoint, without Megatron's model and whatever layout and plan saved it."""

import warnings
from pathlib import Path

import torch
from torch.distributed.checkpoint import load
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from hmoe_megatron.checkpoint import directory, manifest
from hmoe_megatron.checkpoint.reader import CheckpointReader, read_metadata
from hmoe_megatron.exits import CheckpointRefused

_MODEL = ("embedding.", "decoder.", "mtp.", "output_layer.")
_OF_VOCABULARY = ("embedding.word_embeddings.weight", "output_layer.weight")


class CheckpointTensors:
    """The model's tensors of one checkpoint; optimizer states are not among them, and are not read."""

    def __init__(self, root: Path, iteration: int | None = None, skip_integrity: bool = False, rows: int | None = None):
        """root: --save directory of a run; rows: of the vocabulary, less what tensor parallelism added.

        Raises CheckpointRefused as a resume does; nothing is unpickled before every file's SHA-256 was compared.
        """
        self._rows = rows
        self.iteration, self.path = directory.find(root, iteration)
        self.settings = manifest.load_manifest(self.path).settings
        if not skip_integrity:
            files = manifest.load_manifest(self.path).files
            found = manifest.damaged_files(self.path, files) + manifest.unlisted_files(self.path, files)
            if found:
                raise CheckpointRefused(
                    f"{self.path} is damaged: {'; '.join(found[: manifest.MAX_DAMAGES])}: give another with --ckpt-step"
                )
        stored = read_metadata(self.path).state_dict_metadata
        self._kinds = {
            key: kind
            for key, kind in stored.items()
            if key.startswith(_MODEL) and isinstance(kind, TensorStorageMetadata)
        }

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {key: self._cut(key, tuple(kind.size)) for key, kind in self._kinds.items()}

    def _cut(self, key: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        is_cut = key in _OF_VOCABULARY and self._rows is not None and self._rows < shape[0]
        return (self._rows, *shape[1:]) if is_cut else shape

    @property
    def dtypes(self) -> dict[str, torch.dtype]:
        return {key: kind.properties.dtype for key, kind in self._kinds.items()}

    def read(self, keys: list[str]) -> dict[str, torch.Tensor]:
        """These tensors, each put together from the pieces it was saved in. Raises CheckpointRefused for a range that
        no file holds."""
        tensors = {key: torch.empty(self._kinds[key].size, dtype=self._kinds[key].properties.dtype) for key in keys}
        for key in keys:
            _check_covered(self.path, key, self._kinds[key])
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")  # as it should be
            load(tensors, storage_reader=CheckpointReader(str(self.path)), no_dist=True)
        return {key: tensor[: self.shapes[key][0]] for key, tensor in tensors.items()}


def _check_covered(path: Path, key: str, kind: TensorStorageMetadata) -> None:
    """torch leaves what no chunk covers as it is in memory. Chunks of a checkpoint don't overlap, so sizes add up."""
    held = sum(chunk.sizes.numel() for chunk in kind.chunks)
    if held != kind.size.numel():
        raise CheckpointRefused(
            f"{path}: {key} has {kind.size.numel()} values, the files hold {held}: give another with --ckpt-step"
        )
