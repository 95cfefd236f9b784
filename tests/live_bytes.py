"""How much memory tensors take at a time."""

import gc
import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Bytes of the tensors made inside that are still there, and the most of it. held: tensors from before.

    in_cycles: what is made may wait for the garbage collector, so that is run first.
    """

    def __init__(self, held, in_cycles: bool = False):
        super().__init__()
        self.now = self.most = 0
        self.in_cycles = in_cycles
        self._there = {tensor.untyped_storage().data_ptr() for tensor in held}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().nbytes():
                self._add(tensor.untyped_storage())
        return out

    def _add(self, storage):
        place, size = storage.data_ptr(), storage.nbytes()
        if place in self._there:  # a view, or Triton's interpreter's second handle
            return
        if self.in_cycles and size > 4096:
            gc.collect()
        self._there.add(place)
        self.now += size
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self._free, place, size)

    def _free(self, place, size):
        self._there.discard(place)
        self.now -= size
