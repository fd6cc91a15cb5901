"""Recycled host buffers."""

from __future__ import annotations

import torch


class HostPool:
    """Hands out uint8 host buffers by exact size and takes them back.

    Sizes come from message specs, so there are few of them; memory is bounded by the most buffers of each size
    that were ever out at once (live micro-batches). Pages of a buffer that no message reached stay untouched,
    so a worst-case buffer costs address space, not memory.
    """

    def __init__(self) -> None:
        self._free: dict[int, list[torch.Tensor]] = {}

    def take(self, size: int) -> torch.Tensor:
        """A uint8 buffer ``[size]`` with undefined contents."""
        free = self._free.get(size)
        return free.pop() if free else torch.empty(size, dtype=torch.uint8)

    def give(self, buffer: torch.Tensor) -> None:
        """Take back a buffer that `take` handed out."""
        self._free.setdefault(buffer.numel(), []).append(buffer)
