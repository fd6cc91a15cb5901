"""Recycled host buffers."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch


class _Lent(np.ndarray[Any, np.dtype[np.uint8]]):
    """Memory of the pool that gives itself back once nobody holds it; ``weakref.finalize`` costs three times that."""

    home: list[Any] | None = None

    def __del__(self) -> None:
        if self.home is not None:
            self.home.append(self.base)


class HostPool:
    """Hands out uint8 host buffers by exact size; each comes back by itself when nothing uses its memory any more.

    That is: when the last tensor that views it is gone, those that autograd has saved included. So whoever gets a
    message computes on the memory it arrived in, and nobody has to know how long.

    Sizes come from message specs, so there are few of them; memory is bounded by the most buffers of each size
    that were ever out at once (live micro-batches). Pages of a buffer that no message reached stay untouched,
    so a worst-case buffer costs address space, not memory.
    """

    def __init__(self) -> None:
        self._free: dict[int, list[np.ndarray]] = {}

    def take(self, size: int) -> torch.Tensor:
        """A uint8 buffer ``[size]`` with undefined contents."""
        free = self._free.get(size)
        if free is None:
            free = self._free[size] = []
        memory = free.pop() if free else np.empty(size, np.uint8)
        lent = memory.view(_Lent)  # lives as long as the tensor's storage does
        lent.home = free
        return torch.from_numpy(lent)
