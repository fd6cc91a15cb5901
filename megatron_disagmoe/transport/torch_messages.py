"""What the ``torch`` transport knows about its pairs of ranks and the receives under way."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from megatron_disagmoe.transport.base import Message, TransferKey
from megatron_disagmoe.transport.handles import PostedRecv
from megatron_disagmoe.transport.wire import HELLO_WORDS, Layout, Where


@dataclass
class SendPair:
    """What this rank knows about one target on one channel."""

    layout: Layout
    group_rank: int
    sequence: int = 0


@dataclass
class RecvPair:
    """What this rank knows about one source on one channel.

    ``pending``: receives whose header record has not been read. ``bodies[j]``: posted receives for body ``j``
    that no message has claimed yet (an empty body is not sent, so one may serve a later message).
    """

    layout: Layout
    group_rank: int
    hello: torch.Tensor = field(default_factory=lambda: torch.zeros(HELLO_WORDS, dtype=torch.int64))
    hello_work: Any = None
    is_open: bool = False
    sequence: int = 0
    pending: deque[Recv] = field(default_factory=deque)
    bodies: list[deque[tuple[Any, torch.Tensor]]] = field(default_factory=list)


class Recv(PostedRecv):
    """One posted receive.

    Args:
        complete: waits for the whole message.
        key: what is expected.
        pair: whom it is expected from.
        exact: whether a thread reads the header record and then sets ``headed``.
    """

    def __init__(
        self, where: Where, complete: Callable[[Recv], Message], key: TransferKey, pair: RecvPair, *, exact: bool
    ) -> None:
        super().__init__(where)
        self._wait_for, self.key, self.pair = complete, key, pair
        self.sequence = pair.sequence
        self.record: torch.Tensor | None = None
        self.record_work: Any = None
        self.header_message: Message | None = None
        self.rows: list[int] = []
        self.bodies: dict[int, tuple[Any, torch.Tensor]] = {}
        self.headed = threading.Event() if exact else None

    def _complete(self) -> Message:
        return self._wait_for(self)

    def parse(self) -> None:
        """Read the header record, which has come.

        Raises:
            TransportError: where it is not the message expected.
        """
        assert self.record is not None, "it was posted"
        unpacked = self.pair.layout.unpack(self.where, self.key, self.sequence, self.record)
        self.header_message, self.rows = unpacked

    def take(self) -> Message:
        """Without a copy: a buffer goes back to the pool when nothing uses its memory (on a device, to torch's)."""
        message = self.wait()
        self.release()
        return message

    def release(self) -> None:
        self.message = self.header_message = self.record = self.record_work = None
        self.bodies = {}
