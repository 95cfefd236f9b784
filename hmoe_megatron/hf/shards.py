"""A directory of sharded safetensors, written block by block, each tensor read back and hashed."""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

INDEX_FILE = "model.safetensors.index.json"


class ShardWriter:
    """Writes a file a block, so that no more than a block is held. digests: tensor -> SHA-256 of its bytes on disk."""

    def __init__(self, folder: Path, shards: int):
        self.folder, self.shards = folder, shards
        self.weight_map: dict[str, str] = {}
        self.digests: dict[str, str] = {}
        self.bytes = 0

    def write(self, tensors: dict[str, torch.Tensor]) -> None:
        """Write the next file; `tensors` is empty afterwards. Every one of them is to be read back."""
        number = len(set(self.weight_map.values())) + 1
        name = f"model-{number:05d}-of-{self.shards:05d}.safetensors"
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, self.folder / name, {"format": "pt"})
        os.chmod(self.folder / name, 0o666 & ~_umask())  # it makes them readable by the user alone
        self.weight_map |= dict.fromkeys(tensors, name)
        tensors.clear()

    def read_back(self, name: str) -> torch.Tensor:
        """As the disk has it; it is counted and hashed."""
        with safe_open(self.folder / self.weight_map[name], framework="pt") as file:
            tensor = file.get_tensor(name)
        self.digests[name] = digest(tensor)
        self.bytes += tensor.nbytes
        return tensor

    def finish(self) -> None:
        assert self.digests.keys() == self.weight_map.keys()
        index = {"metadata": {"total_size": self.bytes}, "weight_map": dict(sorted(self.weight_map.items()))}
        (self.folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def digest(tensor: torch.Tensor) -> str:
    """SHA-256 of dtype, shape and bytes."""
    found = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)}\n".encode())
    found.update(tensor.contiguous().view(-1).view(torch.uint8).numpy())
    return found.hexdigest()


def digest_of_all(digests: Mapping[str, str]) -> str:
    """One SHA-256 over the names and digests of all tensors."""
    return hashlib.sha256("".join(f"{name} {digests[name]}\n" for name in sorted(digests)).encode()).hexdigest()
