"""The ``torch`` transport: point-to-point messages of torch.distributed, gloo on hosts and NCCL on GPUs.

Facts about gloo that shape this file (torch 2.13): a send completes only once its receive is posted;
``is_completed`` of a send or receive stays False until someone waits, and a wait that times out breaks the
connection, so completion cannot be polled; a message longer than its buffer ends the process. Hence receives are
posted ahead into worst-case buffers, a peer's sizes are checked before the first payload may land (``wire.Layout``),
and one thread waits for sends in order, so that their memory is freed without anyone asking.

NCCL needs equal sizes at both ends, so there the header records travel over a gloo group, and a thread per
receiving channel posts the bodies when a record has come, in the order the receives were posted (two ranks that
post in different orders on one communicator would deadlock). The same path runs on hosts with ``exact=True``,
which is how it is tested without a GPU.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from megatron_disagmoe.transport.base import (
    ChannelSpec,
    Message,
    MessageSpec,
    RecvHandle,
    SendHandle,
    TransferKey,
    Transport,
    check_message,
    check_same_spec,
)
from megatron_disagmoe.transport.handles import lost, nothing_came
from megatron_disagmoe.transport.pool import HostPool
from megatron_disagmoe.transport.torch_groups import FIRST_BODY_TAG, RECORD_TAG, Groups, create_groups, reason
from megatron_disagmoe.transport.torch_headers import HeaderThreads
from megatron_disagmoe.transport.torch_messages import Recv, RecvPair, SendPair
from megatron_disagmoe.transport.torch_sends import Reaper, Send
from megatron_disagmoe.transport.wire import HELLO_WORDS, Layout, Where, view_section


class TorchTransport(Transport):
    """See the module's docstring; collective over the world to create.

    Args:
        channels: every channel of the job, in the same order on every rank.
        device: where the sections live.
        timeout_seconds: how long one wait may last.
        exact: post bodies only when their sizes are known, as NCCL needs; implied by a CUDA device.
    """

    def __init__(
        self,
        channels: Sequence[ChannelSpec],
        *,
        device: torch.device,
        timeout_seconds: float,
        exact: bool = False,
    ) -> None:
        super().__init__(channels, timeout_seconds=timeout_seconds)
        self.device = device
        self.rank = dist.get_rank()
        self._exact = exact or device.type == "cuda"
        self._groups = create_groups(channels, device=device, timeout_seconds=timeout_seconds)
        self._send_pairs: dict[tuple[str, int], SendPair] = {}
        self._recv_pairs: dict[tuple[str, int], RecvPair] = {}
        self._pool = HostPool()
        self._reaper = Reaper(device)
        self._unflushed: deque[Send] = deque()
        stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._headers = HeaderThreads(device, stream, self._post_record)

    # ---- sending ----

    def send(
        self, channel: ChannelSpec, key: TransferKey, peer: int, message: Message, spec: MessageSpec
    ) -> SendHandle:
        rows = check_message(channel, key, message, spec)
        if self._reaper.error is not None:
            raise self._reaper.error
        name = channel.name
        groups, pair = self._groups[name], self._send_pairs.get((name, peer))
        if pair is None:
            layout = Layout.of(spec, on_host=self.device.type == "cpu")
            pair = self._send_pairs[name, peer] = SendPair(layout, dist.get_group_rank(groups.host, peer))
        layout, to = pair.layout, pair.group_rank
        check_same_spec(channel, peer, layout.spec, spec)
        record = layout.pack(key, pair.sequence, message, rows)
        parts = [(groups.host, record, RECORD_TAG)]
        if pair.sequence == 0:
            parts.insert(0, (groups.host, layout.hello(), RECORD_TAG))
        for j, i in enumerate(layout.bodies):
            if rows[i]:
                body = message.sections[i].detach().contiguous().view(torch.uint8)
                parts.append((groups.body, body, FIRST_BODY_TAG + j))
        where = Where(channel, key, self.rank, peer, receiving=False)
        send = Send(where, [tensor for _, tensor, _ in parts], self.timeout_seconds, self._reaper.over)
        try:
            for group, tensor, tag in parts:
                send.works.append(group.send([tensor], to, tag))
        except RuntimeError as error:
            raise lost(where, send.size, reason(error)) from error
        pair.sequence += 1
        self.traffic[name].add(spec, rows, header=layout.num_words * 8)
        self._reaper.add(send)
        unflushed = self._unflushed
        while unflushed and unflushed[0].done:
            unflushed.popleft()
        unflushed.append(send)
        return send

    def flush(self) -> None:
        while self._unflushed:
            self._unflushed[0].wait()
            self._unflushed.popleft()

    # ---- receiving ----

    def post_recv(self, channel: ChannelSpec, key: TransferKey, peer: int, spec: MessageSpec) -> RecvHandle:
        name = channel.name
        groups, where = self._groups[name], Where(channel, key, self.rank, peer, receiving=True)
        try:
            pair = self._recv_pairs.get((name, peer))
            if pair is None:
                pair = self._recv_pairs[name, peer] = self._open(groups, peer, spec)
            check_same_spec(channel, peer, pair.layout.spec, spec)
            recv = Recv(where, self._complete, key, pair, exact=self._exact)
            pair.sequence += 1
            if self._exact:
                self._headers.add(channel, groups, recv)
            else:
                pair.pending.append(recv)
                if pair.is_open:
                    self._post_record(groups, recv)
                    self._post_bodies(groups, pair)
        except RuntimeError as error:
            raise lost(where, spec.max_bytes, reason(error)) from error
        return recv

    def _open(self, groups: Groups, peer: int, spec: MessageSpec) -> RecvPair:
        layout = Layout.of(spec, on_host=self.device.type == "cpu")
        pair = RecvPair(layout, dist.get_group_rank(groups.host, peer), bodies=[deque() for _ in layout.bodies])
        pair.hello_work = groups.host.recv([pair.hello], pair.group_rank, RECORD_TAG)
        return pair

    def _post_record(self, groups: Groups, recv: Recv) -> None:
        recv.record = self._pool.take(recv.pair.layout.record_bytes)
        recv.record_work = groups.host.recv([recv.record], recv.pair.group_rank, RECORD_TAG)

    def _post_bodies(self, groups: Groups, pair: RecvPair) -> None:
        """Have a worst-case receive posted for each body of every message that is still to come."""
        for j, posted in enumerate(pair.bodies):
            size = pair.layout.spec.sections[pair.layout.bodies[j]].max_bytes
            while len(posted) < len(pair.pending):
                buffer = self._pool.take(size)
                posted.append((groups.body.recv([buffer], pair.group_rank, FIRST_BODY_TAG + j), buffer))

    def _complete(self, recv: Recv) -> Message:
        """Wait for a whole message."""
        deadline = time.monotonic() + self.timeout_seconds
        layout = recv.pair.layout
        if recv.headed is None:
            self._read_headers(recv, deadline)
        elif not recv.headed.wait(self.timeout_seconds):
            raise nothing_came(recv.where, self.timeout_seconds, layout.spec.max_bytes)
        if recv.error is not None:
            raise recv.error
        assert recv.header_message is not None
        sections = list(recv.header_message.sections)
        for i, (work, buffer) in recv.bodies.items():
            size = recv.rows[i] * layout.spec.sections[i].row_bytes
            self._wait(recv, work, deadline, expected=size, on_device=buffer.device.type == "cuda")
            if buffer.device.type == "cuda":
                buffer.record_stream(torch.cuda.current_stream(buffer.device))
            sections[i] = view_section(buffer, layout.spec, i, recv.rows[i])
        for i in layout.bodies:
            if not recv.rows[i]:
                sections[i] = sections[i].to(self.device)
        return Message(recv.header_message.header, tuple(sections))

    def _read_headers(self, recv: Recv, deadline: float) -> None:
        """Read header records in order up to ``recv``'s; each claims the bodies it announces."""
        groups, pair = self._groups[recv.where.channel.name], recv.pair
        if not pair.is_open:
            self._wait(recv, pair.hello_work, deadline, expected=HELLO_WORDS * 8)
            pair.layout.check_hello(recv.where, pair.hello)
            pair.is_open = True
            for waiting in pair.pending:
                self._post_record(groups, waiting)
            self._post_bodies(groups, pair)
        while recv.header_message is None:
            first = pair.pending[0]
            self._wait(first, first.record_work, deadline, expected=pair.layout.record_bytes)
            first.parse()
            pair.pending.popleft()
            for j, i in enumerate(pair.layout.bodies):
                if first.rows[i]:
                    first.bodies[i] = pair.bodies[j].popleft()

    def _wait(self, recv: Recv, work: Any, deadline: float, *, expected: int, on_device: bool = False) -> None:
        remaining = max(deadline - time.monotonic(), 0.001)
        try:
            if on_device:
                work.wait()  # holds up the current stream only; NCCL's watchdog keeps the timeout
            else:
                work.wait(timedelta(seconds=remaining))
        except RuntimeError as error:
            if "timed out" in str(error).lower():
                raise nothing_came(recv.where, self.timeout_seconds, expected) from error
            raise lost(recv.where, expected, reason(error)) from error

    def close(self) -> None:
        self._reaper.close()
        self._headers.close()
        for groups in self._groups.values():
            for group in {groups.host, groups.body}:
                dist.destroy_process_group(group)
        self._groups = {}
