"""Reads Megatron's torch_dist files as what they are: untrusted. Nothing but the classes of a checkpoint is unpickled.

torch's own reader unpickles `.metadata` whatever it holds, follows any path in it, and loads objects with
weights_only=False; all three would run or read what an attacker put there.
"""

import pickle
import re
import stat
from pathlib import Path

import torch
from megatron.core.dist_checkpointing.strategies.cached_metadata_filesystem_reader import CachedMetadataFileSystemReader
from megatron.core.rerun_state_machine import Call, Caller
from torch.distributed.checkpoint import FileSystemReader, Metadata
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, StorageMeta, TensorStorageMetadata

from hmoe_megatron.exits import OTHER_CHECKPOINT, CheckpointRefused

MAX_METADATA_BYTES = 1 << 30
# Besides those that Megatron names safe: what its rerun machine notes of a loss that is spiky or not finite.
OBJECT_CLASSES = [Call, Caller]
_ALLOWED = {
    "torch": {"Size"},
    "torch.serialization": {"_get_layout"},
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo", "_StoragePrefix"},
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.planner": {
        "BytesIOWriteData",
        "SavePlan",
        "TensorWriteData",
        "WriteItem",
        "WriteItemType",
    },
    "collections": {"OrderedDict"},
    "pathlib": {"PosixPath"},
    "pathlib._local": {"PosixPath"},  # Python 3.13
    "builtins": {"set"},
}


class _MetadataUnpickler(pickle._Unpickler):
    """Knows the classes of torch's checkpoint metadata and no other.

    Python's own unpickler, not the one in C: that one makes room for as many objects as a PUT names, and a few bytes
    would have it fill the machine's memory.
    """

    def find_class(self, module, name):
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if is_dtype or name in _ALLOWED.get(module, ()):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it holds {module}.{name}, which no checkpoint has")


def read_metadata(folder: Path) -> Metadata:
    """`.metadata` of the checkpoint in `folder`. Raises CheckpointRefused for what is none or names files elsewhere."""
    path = Path(folder) / ".metadata"
    try:
        if path.lstat().st_size > MAX_METADATA_BYTES or not stat.S_ISREG(path.lstat().st_mode):
            raise ValueError(f"no regular file of at most {MAX_METADATA_BYTES} bytes")
        with path.open("rb") as file:
            metadata = _MetadataUnpickler(file).load()
        _check(metadata, Path(folder))
    except Exception as error:  # a damaged pickle may raise anything
        said = error.strerror if isinstance(error, OSError) and error.strerror else f"{error}"
        raise CheckpointRefused(
            f"{path}: {said or type(error).__name__}: not loaded; {OTHER_CHECKPOINT}", on_every_rank=False
        ) from None
    return metadata


def _check(metadata, folder: Path) -> None:
    if not isinstance(metadata, Metadata) or not isinstance(metadata.state_dict_metadata, dict):
        raise ValueError("no metadata of a checkpoint")
    kinds = (TensorStorageMetadata, BytesStorageMetadata)
    if not all(type(name) is str and isinstance(kind, kinds) for name, kind in metadata.state_dict_metadata.items()):
        raise ValueError("its list of tensors is damaged")
    sizes_bytes = {}
    for index, stored in (metadata.storage_data or {}).items():
        name = stored.relative_path
        if name not in sizes_bytes:
            sizes_bytes[name] = _size_bytes(folder, name)
        ranges = (stored.offset, stored.length)
        if not all(type(n) is int and n >= 0 for n in ranges) or sum(ranges) > sizes_bytes[name]:
            raise ValueError(f"{index.fqn} lies beyond the end of {name}")
        if getattr(stored, "transform_descriptors", None):
            raise ValueError(f"{index.fqn} is stored in a transformed form, which no checkpoint here is")


def _size_bytes(folder: Path, name) -> int:
    """Of a file in `folder`. Raises ValueError for a path that leads elsewhere and for what is no regular file."""
    if type(name) is not str or name != Path(name).name or name in ("", ".", ".."):
        raise ValueError(f"{name!r:.80} is no plain file name of the checkpoint's directory")
    status = (folder / name).lstat()
    if not stat.S_ISREG(status.st_mode):
        raise ValueError(f"{name} is no regular file")
    return status.st_size


def refused_pickle(error: BaseException) -> str | None:
    """What torch.load refused to unpickle; None if the error is another."""
    found = re.search(r"GLOBAL ([\w.]+)", str(error))
    return f"it holds {found[1]}, which no checkpoint has" if found else None


class CheckpointReader(FileSystemReader):
    """torch's reader, with metadata and objects unpickled by what a checkpoint may hold."""

    def read_metadata(self, *args, **kwargs) -> Metadata:
        """See StorageReader.read_metadata. Raises CheckpointRefused."""
        metadata = read_metadata(Path(self.path))
        if getattr(metadata, "storage_meta", None) is None:
            metadata.storage_meta = StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata

    def read_data(self, plan, planner):
        """See StorageReader.read_data. An object is first loaded with weights_only=True: the planner's own load of it
        would run code. Raises CheckpointRefused that names it."""
        stock = planner.load_bytes

        def load_bytes(item, value):
            try:
                with torch.serialization.safe_globals(OBJECT_CLASSES):
                    torch.load(value, map_location="cpu", weights_only=True)
            except Exception as error:
                reason = refused_pickle(error) or str(error).split("\n")[0].split(". ")[0]
                raise CheckpointRefused(
                    f"{self.path}: object {item.storage_index.fqn}: {reason:.300}: not loaded; {OTHER_CHECKPOINT}",
                    on_every_rank=False,
                ) from None
            value.seek(0)
            stock(item, value)

        planner.load_bytes = load_bytes
        try:
            return super().read_data(plan, planner)
        finally:
            del planner.load_bytes


class CachingCheckpointReader(CachedMetadataFileSystemReader, CheckpointReader):
    """The same, for --ckpt-assume-constant-structure: metadata is read once a process."""


def checkpoint_reader(checkpoint_dir, cache_metadata: bool = False, async_strategy: str = "mcore") -> CheckpointReader:
    """Stands in for Megatron's `_get_filesystem_reader`."""
    return CachingCheckpointReader(checkpoint_dir) if cache_metadata else CheckpointReader(checkpoint_dir)
