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

import contextlib
import queue
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
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
    TransportError,
    TransportTimeout,
    check_message,
    check_same_spec,
)
from megatron_disagmoe.transport.pool import HostPool
from megatron_disagmoe.transport.wire import HELLO_WORDS, Layout, Where, place, view_section

_FOREVER = timedelta(days=365)
_RECORD_TAG, _FIRST_BODY_TAG = 0, 1


@dataclass
class _Groups:
    """The process groups of one channel: header records over ``host``, bodies over ``body``."""

    host: dist.ProcessGroup
    body: dist.ProcessGroup


def _create_groups(
    channels: Sequence[ChannelSpec], *, device: torch.device, timeout_seconds: float
) -> dict[str, _Groups]:
    """Create every channel's groups, in the same order on every rank; keep those this rank is on."""
    groups = {}
    me = dist.get_rank()
    for channel in channels:
        host = dist.new_group(channel.ranks, backend="gloo", timeout=_FOREVER)
        body = host
        if device.type == "cuda":
            # device_id makes torch connect now and use one communicator for every pair, not one per pair later.
            timeout = timedelta(seconds=timeout_seconds)
            body = dist.new_group(channel.ranks, backend="nccl", timeout=timeout, device_id=device)
        if me in channel.ranks:
            groups[channel.name] = _Groups(host, body)
    return groups


class _Send(SendHandle):
    """One message under way; keeps its tensors alive."""

    def __init__(self, where: Where, size: int, timeout_seconds: float) -> None:
        self.where, self.size, self.timeout_seconds = where, size, timeout_seconds
        self.tensors: list[torch.Tensor] = []
        self.works: list[Any] = []
        self.error: TransportError | None = None
        self.done = threading.Event()

    def wait(self) -> None:
        if not self.done.wait(self.timeout_seconds):
            raise TransportTimeout(
                f"{self.where}: not taken within {self.timeout_seconds:g} s (--af-timeout-seconds); "
                f"expected the peer to receive {self.size} bytes, had no sign of it"
            )
        if self.error is not None:
            raise self.error


class _Reaper:
    """Waits for sends in the order they were made and frees their memory."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._queue: queue.SimpleQueue[_Send | None] = queue.SimpleQueue()
        self.error: TransportError | None = None
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="af-transport-sends", daemon=True)
        self._thread.start()

    def add(self, send: _Send) -> None:
        self._queue.put(send)

    def _run(self) -> None:
        while (send := self._queue.get()) is not None:
            try:
                self._wait_for(send.works)
            except RuntimeError as error:
                send.error = TransportError(
                    f"{send.where}: the connection was lost; expected the peer to receive {send.size} bytes "
                    f"({_reason(error)})"
                )
                if not self._closing:
                    self.error = self.error or send.error
            send.completed_ns = time.perf_counter_ns()
            send.works, send.tensors = [], []
            send.done.set()

    def _wait_for(self, works: list[Any]) -> None:
        if self._stream is None:
            for work in works:
                work.wait(_FOREVER)
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


@dataclass
class _SendPair:
    """What this rank knows about one target on one channel."""

    layout: Layout
    group_rank: int
    sequence: int = 0


@dataclass
class _RecvPair:
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
    pending: deque[_Recv] = field(default_factory=deque)
    bodies: list[deque[tuple[Any, torch.Tensor]]] = field(default_factory=list)


class _Recv(RecvHandle):
    """One posted receive."""

    def __init__(self, transport: TorchTransport, channel: ChannelSpec, key: TransferKey, peer: int) -> None:
        self.transport, self.channel, self.key, self.peer = transport, channel, key, peer
        self.sequence = 0
        self.record: torch.Tensor | None = None
        self.record_work: Any = None
        self.header_message: Message | None = None
        self.rows: list[int] = []
        self.bodies: dict[int, tuple[Any, torch.Tensor]] = {}
        self.error: TransportError | None = None
        self.headed = threading.Event() if transport._exact else None
        self.message: Message | None = None

    @property
    def where(self) -> Where:
        return place(self.channel, self.key, me=self.transport.rank, peer=self.peer, receiving=True)

    def wait(self) -> Message:
        if self.message is None:
            self.message = self.transport._complete(self)
        return self.message

    def take(self) -> Message:
        """Without a copy: a buffer goes back to the pool when nothing uses its memory (on a device, to torch's)."""
        message = self.wait()
        self.release()
        return message

    def release(self) -> None:
        self.message = self.header_message = self.record = self.record_work = None
        self.bodies = {}


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
        self._groups = _create_groups(channels, device=device, timeout_seconds=timeout_seconds)
        self._send_pairs: dict[tuple[str, int], _SendPair] = {}
        self._recv_pairs: dict[tuple[str, int], _RecvPair] = {}
        self._pool = HostPool()
        self._reaper = _Reaper(device)
        self._unflushed: deque[_Send] = deque()
        self._header_queues: dict[str, queue.SimpleQueue[_Recv | None]] = {}
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    # ---- sending ----

    def send(
        self, channel: ChannelSpec, key: TransferKey, peer: int, message: Message, spec: MessageSpec
    ) -> SendHandle:
        rows = check_message(channel, key, message, spec)
        if self._reaper.error is not None:
            raise self._reaper.error
        groups = self._groups[channel.name]
        pair = self._send_pairs.get((channel.name, peer))
        if pair is None:
            layout = Layout.of(spec, on_host=self.device.type == "cpu")
            pair = _SendPair(layout, dist.get_group_rank(groups.host, peer))
            self._send_pairs[channel.name, peer] = pair
        check_same_spec(channel, peer, pair.layout.spec, spec)
        record = pair.layout.pack(key, pair.sequence, message, rows)
        parts = [(groups.host, record, _RECORD_TAG)]
        if pair.sequence == 0:
            parts.insert(0, (groups.host, pair.layout.hello(), _RECORD_TAG))
        for j, i in enumerate(pair.layout.bodies):
            if rows[i]:
                body = message.sections[i].detach().contiguous().view(torch.uint8)
                parts.append((groups.body, body, _FIRST_BODY_TAG + j))
        where = place(channel, key, me=self.rank, peer=peer, receiving=False)
        send = _Send(where, sum(part.numel() for _, part, _ in parts), self.timeout_seconds)
        try:
            for group, tensor, tag in parts:
                send.tensors.append(tensor)
                send.works.append(group.send([tensor], pair.group_rank, tag))
        except RuntimeError as error:
            raise TransportError(
                f"{where}: the connection was lost; expected the peer to receive {send.size} bytes, sent 0 "
                f"({_reason(error)})"
            ) from error
        pair.sequence += 1
        self.traffic[channel.name].add(spec, rows, header=pair.layout.num_words * 8)
        self._reaper.add(send)
        while self._unflushed and self._unflushed[0].done.is_set():
            self._unflushed.popleft()
        self._unflushed.append(send)
        return send

    def flush(self) -> None:
        while self._unflushed:
            self._unflushed[0].wait()
            self._unflushed.popleft()

    # ---- receiving ----

    def post_recv(self, channel: ChannelSpec, key: TransferKey, peer: int, spec: MessageSpec) -> RecvHandle:
        groups = self._groups[channel.name]
        pair = self._recv_pairs.get((channel.name, peer))
        recv = _Recv(self, channel, key, peer)
        try:
            if pair is None:
                layout = Layout.of(spec, on_host=self.device.type == "cpu")
                pair = _RecvPair(layout, dist.get_group_rank(groups.host, peer))
                pair.bodies = [deque() for _ in layout.bodies]
                pair.hello_work = groups.host.recv([pair.hello], pair.group_rank, _RECORD_TAG)
                self._recv_pairs[channel.name, peer] = pair
            check_same_spec(channel, peer, pair.layout.spec, spec)
            recv.sequence = pair.sequence
            pair.sequence += 1
            if self._exact:
                self._header_queue(channel).put(recv)
            else:
                pair.pending.append(recv)
                if pair.is_open:
                    self._post_record(groups, pair, recv)
                    self._post_bodies(groups, pair, len(pair.pending))
        except RuntimeError as error:
            raise self._lost(recv, spec.max_bytes, error) from error
        return recv

    def _post_record(self, groups: _Groups, pair: _RecvPair, recv: _Recv) -> None:
        recv.record = self._pool.take(pair.layout.record_bytes)
        recv.record_work = groups.host.recv([recv.record], pair.group_rank, _RECORD_TAG)

    def _post_bodies(self, groups: _Groups, pair: _RecvPair, count: int) -> None:
        """Have a worst-case receive posted for each body of ``count`` messages."""
        for j, posted in enumerate(pair.bodies):
            size = pair.layout.spec.sections[pair.layout.bodies[j]].max_bytes
            while len(posted) < count:
                buffer = self._pool.take(size)
                posted.append((groups.body.recv([buffer], pair.group_rank, _FIRST_BODY_TAG + j), buffer))

    def _complete(self, recv: _Recv) -> Message:
        """Wait for a whole message."""
        deadline = time.monotonic() + self.timeout_seconds
        if self._exact:
            assert recv.headed is not None, "made where sizes come first"
            if not recv.headed.wait(self.timeout_seconds):
                pair = self._recv_pairs[recv.channel.name, recv.peer]
                raise self._timeout(recv, pair.layout.spec.max_bytes)
            if recv.error is not None:
                raise recv.error
        else:
            self._read_headers(recv, deadline)
        pair = self._recv_pairs[recv.channel.name, recv.peer]
        assert recv.header_message is not None
        sections = list(recv.header_message.sections)
        for i, (work, buffer) in recv.bodies.items():
            size = recv.rows[i] * pair.layout.spec.sections[i].row_bytes
            self._wait(recv, work, deadline, expected=size, on_device=buffer.device.type == "cuda")
            if buffer.device.type == "cuda":
                buffer.record_stream(torch.cuda.current_stream(buffer.device))
            sections[i] = view_section(buffer, pair.layout.spec, i, recv.rows[i])
        for i in pair.layout.bodies:
            if not recv.rows[i]:
                sections[i] = sections[i].to(self.device)
        return Message(recv.header_message.header, tuple(sections))

    def _read_headers(self, recv: _Recv, deadline: float) -> None:
        """Read header records in order up to ``recv``'s; each claims the bodies it announces."""
        groups = self._groups[recv.channel.name]
        pair = self._recv_pairs[recv.channel.name, recv.peer]
        if not pair.is_open:
            self._wait(recv, pair.hello_work, deadline, expected=HELLO_WORDS * 8)
            pair.layout.check_hello(recv.where, pair.hello)
            pair.is_open = True
            for waiting in pair.pending:
                self._post_record(groups, pair, waiting)
            self._post_bodies(groups, pair, len(pair.pending))
        while recv.header_message is None:
            first = pair.pending[0]
            self._wait(first, first.record_work, deadline, expected=pair.layout.record_bytes)
            self._parse(first, pair)
            pair.pending.popleft()
            for j, i in enumerate(pair.layout.bodies):
                if first.rows[i]:
                    first.bodies[i] = pair.bodies[j].popleft()

    def _parse(self, recv: _Recv, pair: _RecvPair) -> None:
        assert recv.record is not None
        recv.header_message, recv.rows = pair.layout.unpack(recv.where, recv.key, recv.sequence, recv.record)

    def _wait(self, recv: _Recv, work: Any, deadline: float, *, expected: int, on_device: bool = False) -> None:
        remaining = max(deadline - time.monotonic(), 0.001)
        try:
            if on_device:
                work.wait()  # holds up the current stream only; NCCL's watchdog keeps the timeout
            else:
                work.wait(timedelta(seconds=remaining))
        except RuntimeError as error:
            if "timed out" in str(error).lower():
                raise self._timeout(recv, expected) from error
            raise self._lost(recv, expected, error) from error

    def _lost(self, recv: _Recv, expected: int, error: RuntimeError) -> TransportError:
        return TransportError(
            f"{recv.where}: the connection was lost; expected up to {expected} bytes, had 0 ({_reason(error)})"
        )

    def _timeout(self, recv: _Recv, expected: int) -> TransportTimeout:
        return TransportTimeout(
            f"{recv.where}: nothing came within {self.timeout_seconds:g} s (--af-timeout-seconds); "
            f"expected up to {expected} bytes, had 0"
        )

    # ---- bodies posted when their sizes are known ----

    def _header_queue(self, channel: ChannelSpec) -> queue.SimpleQueue[_Recv | None]:
        if channel.name not in self._header_queues:
            header_queue = self._header_queues[channel.name] = queue.SimpleQueue()
            threading.Thread(
                target=self._run_headers,
                args=(self._groups[channel.name], header_queue),
                name=f"af-transport {channel.name}",
                daemon=True,
            ).start()
        return self._header_queues[channel.name]

    def _run_headers(self, groups: _Groups, header_queue: queue.SimpleQueue[_Recv | None]) -> None:
        """Read header records in the order the receives were posted, and post their bodies with exact sizes."""
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        while (recv := header_queue.get()) is not None:
            pair = self._recv_pairs[recv.channel.name, recv.peer]
            try:
                if not pair.is_open:
                    pair.hello_work.wait(_FOREVER)
                    pair.layout.check_hello(recv.where, pair.hello)
                    pair.is_open = True
                self._post_record(groups, pair, recv)
                recv.record_work.wait(_FOREVER)
                self._parse(recv, pair)
                # On a stream of our own a receive waits for no compute.
                with torch.cuda.stream(self._stream) if self._stream is not None else contextlib.nullcontext():
                    for j, i in enumerate(pair.layout.bodies):
                        if recv.rows[i]:
                            size = recv.rows[i] * pair.layout.spec.sections[i].row_bytes
                            buffer = torch.empty(size, dtype=torch.uint8, device=self.device)
                            work = groups.body.recv([buffer], pair.group_rank, _FIRST_BODY_TAG + j)
                            recv.bodies[i] = (work, buffer)
            except TransportError as error:
                recv.error = error
            except RuntimeError as error:
                recv.error = self._lost(recv, pair.layout.spec.max_bytes, error)
            assert recv.headed is not None, "made where sizes come first"
            recv.headed.set()

    def close(self) -> None:
        self._reaper.close()
        for header_queue in self._header_queues.values():
            header_queue.put(None)
        for groups in self._groups.values():
            for group in {groups.host, groups.body}:
                dist.destroy_process_group(group)
        self._groups = {}


def _reason(error: RuntimeError) -> str:
    """What gloo says, without its source line and its advice."""
    return str(error).split("] ", 1)[-1].split(". This is typically", 1)[0]
