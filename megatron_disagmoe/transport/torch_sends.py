"""Sends of the ``torch`` transport: somebody has to wait for them, so that their memory is freed."""

from __future__ import annotations

import queue
import threading
import time
from typing import Any

import torch

from megatron_disagmoe.transport.base import SendHandle, TransportError
from megatron_disagmoe.transport.handles import lost, not_taken
from megatron_disagmoe.transport.torch_groups import FOREVER, reason
from megatron_disagmoe.transport.wire import Where


class Send(SendHandle):
    """One message under way; keeps its tensors alive. ``done``: told to whoever waits for ``over``."""

    def __init__(
        self, where: Where, tensors: list[torch.Tensor], timeout_seconds: float, over: threading.Condition
    ) -> None:
        self.where, self.tensors, self.timeout_seconds, self._over = where, tensors, timeout_seconds, over
        self.works: list[Any] = []
        self.error: TransportError | None = None
        self.done = False

    @property
    def size(self) -> int:
        """Bytes, as long as it is under way."""
        return sum(tensor.nbytes for tensor in self.tensors)

    def wait(self) -> None:
        if not self.done:
            with self._over:
                if not self._over.wait_for(lambda: self.done, self.timeout_seconds):
                    raise not_taken(self.where, self.timeout_seconds, self.size)
        if self.error is not None:
            raise self.error


class Reaper:
    """A thread that waits for sends in the order they were made and frees their memory.

    Attributes:
        error: of the first send that failed.
        over: told whenever a send is over; one for all, since making one for each costs more than the telling.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._queue: queue.SimpleQueue[Send | None] = queue.SimpleQueue()
        self.error: TransportError | None = None
        self.over = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="af-transport-sends", daemon=True)
        self._thread.start()

    def add(self, send: Send) -> None:
        """Take over a send that has been started."""
        self._queue.put(send)

    def _run(self) -> None:
        while (send := self._queue.get()) is not None:
            try:
                self._wait_for(send.works)
            except RuntimeError as error:
                send.error = lost(send.where, send.size, reason(error))
                if not self._closing:
                    self.error = self.error or send.error
            send.completed_ns = time.perf_counter_ns()
            send.works, send.tensors = [], []
            with self.over:
                send.done = True
                self.over.notify_all()

    def _wait_for(self, works: list[Any]) -> None:
        if self._stream is None:
            for work in works:
                work.wait(FOREVER)
        else:
            # NCCL's wait holds up the current stream, so let that be one that does nothing else.
            with torch.cuda.stream(self._stream):
                for work in works:
                    work.wait()
            self._stream.synchronize()

    def close(self) -> None:
        """Stop the thread; sends that nobody took are dropped.

        Nothing calls off a wait for a send (torch 2.13): a thread in the midst of one is left behind, and ends with
        the process.
        """
        self._closing = True
        self._queue.put(None)
        self._thread.join(1.0)
