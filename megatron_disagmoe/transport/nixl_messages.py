"""What the ``nixl`` transport knows about its pairs of ranks and the messages under way."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from megatron_disagmoe.transport.base import Message, SendHandle, TransferKey, TransportError
from megatron_disagmoe.transport.handles import PostedRecv
from megatron_disagmoe.transport.nixl_memory import Slot
from megatron_disagmoe.transport.nixl_protocol import Offer
from megatron_disagmoe.transport.wire import Layout, Where


@dataclass(eq=False)
class SendState:
    """One message on its way out."""

    pair: SendPair
    where: Where
    sequence: int
    size: int
    slot: Slot | None
    ready: torch.cuda.Event | None = None
    handle: Any = None
    done: bool = False
    error: TransportError | None = None


@dataclass(eq=False)
class SendPair:
    """What this rank knows about one target on one channel; ``offers`` by sequence number."""

    layout: Layout
    number: int
    peer: int
    sequence: int = 0
    offers: dict[int, Offer] = field(default_factory=dict)


@dataclass(eq=False)
class RecvPair:
    """What this rank knows about one source on one channel, by sequence number; ``capacity``: of the next slot."""

    layout: Layout
    number: int
    peer: int
    capacity: int
    sequence: int = 0
    expected: dict[int, Recv] = field(default_factory=dict)


class Send(SendHandle):
    """The tensors were copied into registered memory, so they are free at once."""

    def __init__(self, state: SendState) -> None:
        self._state = state

    def wait(self) -> None:
        if self._state.error is not None:
            raise self._state.error


class Recv(PostedRecv):
    """One posted receive.

    Args:
        complete: waits for the whole message.
        give_back: takes a slot of registered memory back; any thread may call it.
    """

    def __init__(
        self,
        where: Where,
        complete: Callable[[Recv], Message],
        give_back: Callable[[Slot], None],
        key: TransferKey,
        pair: RecvPair,
    ) -> None:
        super().__init__(where)
        self._wait_for, self._give_back, self.key, self.pair = complete, give_back, key, pair
        self.sequence = pair.sequence
        self.slot: Slot | None = None
        self.memory: np.ndarray | None = None  # the slot's, on a host: what the message's tensors keep alive
        self.record: torch.Tensor | None = None
        self.size: int | None = None
        self.has_data = False

    @property
    def is_here(self) -> bool:
        return self.error is not None or self.size == 0 or (self.size is not None and self.has_data)

    def _complete(self) -> Message:
        return self._wait_for(self)

    def take(self) -> Message:
        """On a host without a copy: the slot goes back when nothing uses its memory, autograd's graph included."""
        message = self.wait()
        if self.slot is not None and self.memory is None:
            return super().take()
        if self.slot is not None:
            weakref.finalize(self.memory, self._give_back, self.slot).atexit = False
        self.message = self.slot = self.memory = None
        return message

    def release(self) -> None:
        self.message = self.memory = None
        slot, self.slot = self.slot, None
        if slot is not None:
            self._give_back(slot)
