"""Streams of plain messages between M attention and N FFN ranks with gloo's own calls, to compare ours with."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from megatron_disagmoe.benchmarks.transport_streams import AHEAD, Pipelined, Sent, Stream


class PointToPoint(Pipelined):
    """gloo's ``isend`` and ``irecv`` of one tensor between every attention and every FFN rank."""

    transport, dispatch = "gloo-p2p", None

    def __init__(self, peers: Sequence[int], size: int) -> None:
        super().__init__()
        self._peers = peers
        self._message = torch.ones(size, dtype=torch.uint8)
        self._buffers = [[torch.empty(size, dtype=torch.uint8) for _ in peers] for _ in range(AHEAD)]
        self._group = dist.new_group(backend="gloo")
        self._num_posted = 0
        self._sent = Sent()

    def sent(self) -> Sent:
        return Sent(self._sent.payload)

    def _post(self) -> None:
        buffers = self._buffers[self._num_posted % AHEAD]
        self._num_posted += 1
        pairs = zip(buffers, self._peers, strict=True)
        self._receives.append([dist.irecv(buffer, peer, group=self._group) for buffer, peer in pairs])

    def _send(self) -> None:
        self._sends.append([dist.isend(self._message, peer, group=self._group) for peer in self._peers])
        self._sent.payload += self._message.nbytes * len(self._peers)


class AllToAll(Stream):
    """gloo's ``all_to_all_single`` over the world, with empty pieces between ranks of one side."""

    transport, dispatch = "gloo-all-to-all", None

    def __init__(self, peers: Sequence[int], size: int) -> None:
        world = dist.get_world_size()
        self._splits = [size if rank in peers else 0 for rank in range(world)]
        total = sum(self._splits)
        self._input = torch.ones(total, dtype=torch.uint8)
        self._outputs = [torch.empty(total, dtype=torch.uint8) for _ in range(AHEAD)]
        self._group = dist.new_group(backend="gloo")
        self._works: deque[Any] = deque()
        self._count = 0
        self._sent = Sent()

    def start(self, count: int) -> None:
        for _ in range(count):
            output = self._outputs[self._count % AHEAD]
            self._count += 1
            work = dist.all_to_all_single(
                output, self._input, self._splits, self._splits, group=self._group, async_op=True
            )
            self._works.append(work)
            self._sent.payload += self._input.nbytes

    def finish(self) -> None:
        while self._works:
            self._works.popleft().wait()

    def run(self, count: int) -> None:
        for _ in range(count):
            if len(self._works) == AHEAD:
                self._works.popleft().wait()
            self.start(1)
        self.finish()

    def sent(self) -> Sent:
        return Sent(self._sent.payload)
