"""Memory registered with a NIXL agent, in recycled slots."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

_SMALLEST = 1 << 16


@dataclass(frozen=True)
class Slot:
    """A registered buffer.

    Attributes:
        buffer: uint8 ``[capacity]``.
        generation: which publication of this rank's metadata describes it; 0 where none does.
        registration: NIXL's descriptor of it.
    """

    buffer: torch.Tensor
    generation: int
    registration: Any

    @property
    def address(self) -> int:
        return self.buffer.data_ptr()

    @property
    def capacity(self) -> int:
        return self.buffer.numel()


def slot_capacity(size: int) -> int:
    """Bytes of the slot that holds ``size``: the next power of two, at least 64 KiB."""
    return max(_SMALLEST, 1 << max(size - 1, 0).bit_length())


class RegisteredMemory:
    """Hands out registered slots by power-of-two size and takes them back; nothing is freed before `close`.

    Args:
        agent: the NIXL agent.
        device: where slots live.
        publish: called with each new registration; returns the generation that peers need to write to it.
            None for memory that only this rank touches.
    """

    def __init__(self, agent: Any, *, device: torch.device, publish: Callable[[Any], int] | None = None) -> None:
        self._agent, self._device, self._publish = agent, device, publish
        self._free: dict[int, list[Slot]] = {}
        self._all: list[Slot] = []

    @property
    def num_bytes(self) -> int:
        """Bytes registered."""
        return sum(slot.capacity for slot in self._all)

    def take(self, size: int) -> Slot:
        """A slot of at least ``size`` bytes."""
        capacity = slot_capacity(size)
        free = self._free.get(capacity)
        if free:
            return free.pop()
        buffer = torch.empty(capacity, dtype=torch.uint8, device=self._device)
        registration = self._agent.register_memory(buffer)
        generation = self._publish(registration) if self._publish is not None else 0
        slot = Slot(buffer, generation, registration)
        self._all.append(slot)
        return slot

    def give(self, slot: Slot) -> None:
        """Take back a slot that `take` handed out; any thread may, without a lock."""
        self._free.setdefault(slot.capacity, []).append(slot)

    def close(self) -> None:
        """Undo every registration."""
        for slot in self._all:
            self._agent.deregister_memory(slot.registration)
        self._all, self._free = [], {}
