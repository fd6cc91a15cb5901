"""Receives of the ``torch`` transport whose bodies are posted once their sizes are known, as NCCL needs."""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Callable

import torch

from megatron_disagmoe.transport.base import ChannelSpec, TransportError
from megatron_disagmoe.transport.handles import lost
from megatron_disagmoe.transport.torch_groups import FIRST_BODY_TAG, FOREVER, Groups, reason
from megatron_disagmoe.transport.torch_messages import Recv


class HeaderThreads:
    """A thread per receiving channel reads header records and posts bodies, in the order receives were posted.

    Args:
        device: where bodies are received.
        stream: of our own, so that a receive waits for no compute; None on a host.
        post_record: posts the receive of a header record.
    """

    def __init__(
        self, device: torch.device, stream: torch.cuda.Stream | None, post_record: Callable[[Groups, Recv], None]
    ) -> None:
        self._device, self._stream, self._post_record = device, stream, post_record
        self._queues: dict[str, queue.SimpleQueue[Recv | None]] = {}

    def add(self, channel: ChannelSpec, groups: Groups, recv: Recv) -> None:
        """Take over a receive; ``recv.headed`` is set when its bodies are posted or it has failed."""
        waiting = self._queues.get(channel.name)
        if waiting is None:
            waiting = self._queues[channel.name] = queue.SimpleQueue()
            name = f"af-transport {channel.name}"
            threading.Thread(target=self._run, args=(groups, waiting), name=name, daemon=True).start()
        waiting.put(recv)

    def _run(self, groups: Groups, waiting: queue.SimpleQueue[Recv | None]) -> None:
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)
        while (recv := waiting.get()) is not None:
            try:
                self._read(groups, recv)
            except TransportError as error:
                recv.error = error
            except RuntimeError as error:
                recv.error = lost(recv.where, recv.pair.layout.spec.max_bytes, reason(error))
            assert recv.headed is not None, "made where sizes come first"
            recv.headed.set()

    def _read(self, groups: Groups, recv: Recv) -> None:
        pair, layout = recv.pair, recv.pair.layout
        if not pair.is_open:
            pair.hello_work.wait(FOREVER)
            layout.check_hello(recv.where, pair.hello)
            pair.is_open = True
        self._post_record(groups, recv)
        recv.record_work.wait(FOREVER)
        recv.parse()
        with torch.cuda.stream(self._stream) if self._stream is not None else contextlib.nullcontext():
            for j, i in enumerate(layout.bodies):
                if recv.rows[i]:
                    size = recv.rows[i] * layout.spec.sections[i].row_bytes
                    buffer = torch.empty(size, dtype=torch.uint8, device=self._device)
                    recv.bodies[i] = groups.body.recv([buffer], pair.group_rank, FIRST_BODY_TAG + j), buffer

    def close(self) -> None:
        """Let the threads end."""
        for waiting in self._queues.values():
            waiting.put(None)
