"""Exact search for few items: depth first, largest item first, cut off by what is left to place."""

import numpy as np

from hmoe_megatron.placement.whole import Items

MAX_ITEMS = 16
MAX_NODES = 6_000  # a count, not a time: the same plan on every machine


def search(items: Items, owner_I: np.ndarray, bound: float) -> np.ndarray:
    """The fullest rank as empty as can be found within MAX_NODES; `owner_I` if none is better.

    bound: a time, at which to stop; a rank is as full as its time over it, or its bytes over its cap.
    """
    return _Search(items, owner_I, bound).run()


class _Search:
    def __init__(self, items: Items, owner_I: np.ndarray, target: float):
        time_IR = (items.time_CI.T / target)[:, items.kind_R]
        share_IR = np.zeros_like(time_IR) if items.cap_R is None else items.bytes_I[:, None] / items.cap_R
        size_I = np.maximum(time_IR.min(axis=1), share_IR.min(axis=1))
        self.order = np.argsort(-size_I, kind="stable").tolist()
        self.time_IR, self.share_IR = time_IR[self.order].tolist(), share_IR[self.order].tolist()
        # What the items from i on need of all ranks together, at the least.
        self.left_I = np.append(np.cumsum(time_IR[self.order].min(axis=1)[::-1])[::-1], 0.0).tolist()
        # Ranks with equal signatures are the same choice while they hold the same.
        caps = [None] * items.ranks if items.cap_R is None else items.cap_R.tolist()
        self.signature = list(zip(items.kind_R.tolist(), caps, strict=True))
        self.best_owner = owner_I
        time_R, share_R = np.zeros(items.ranks), np.zeros(items.ranks)
        for i, rank in zip(self.order, owner_I[self.order].tolist(), strict=True):
            time_R[rank] += items.time_CI[items.kind_R[rank], i] / target
            share_R[rank] += 0.0 if items.cap_R is None else items.bytes_I[i] / items.cap_R[rank]
        self.best = float(np.maximum(time_R, share_R).max())
        self.stop, self.nodes = 1 + 1e-9, 0
        self.time, self.share = [0.0] * items.ranks, [0.0] * items.ranks
        self.owner = [0] * len(self.order)

    def run(self) -> np.ndarray:
        if self.best > self.stop:
            self._place(0)
        return self.best_owner

    def _place(self, i: int) -> None:
        if i == len(self.order):
            self.best = max(map(max, self.time, self.share))
            self.best_owner = np.zeros_like(self.best_owner)
            self.best_owner[self.order] = self.owner
            return
        room = 0.0
        for time in self.time:
            room += max(self.best - time, 0.0)
        if self.left_I[i] >= room:
            return
        tried = set()
        for full, rank in self._choices(i):
            if full >= self.best * (1 - 1e-12) or self.best <= self.stop or self.nodes >= MAX_NODES:
                return
            state = self.signature[rank], self.time[rank], self.share[rank]
            if state in tried:
                continue
            tried.add(state)
            self.nodes += 1
            before = self.time[rank], self.share[rank]
            self.time[rank] += self.time_IR[i][rank]
            self.share[rank] += self.share_IR[i][rank]
            self.owner[i] = rank
            self._place(i + 1)
            self.time[rank], self.share[rank] = before

    def _choices(self, i: int) -> list[tuple[float, int]]:
        """(how full with item i, rank), the emptiest first."""
        loads = zip(self.time, self.time_IR[i], self.share, self.share_IR[i], strict=True)
        return sorted((max(time + more, share + bytes_more), rank)
                      for rank, (time, more, share, bytes_more) in enumerate(loads))
