"""The ``nixl`` transport: one-sided WRITE with notification over UCX (PyPI package ``nixl``).

Between two hosts this is RDMA where there is a network for it (GPUDirect RDMA for CUDA tensors) and TCP where
there is none; within a host, shared memory. Nobody meets anybody: a receiver offers a registered slot, the
sender writes into it and a notification says that the data is there. Notifications have a connection that no
payload holds up (``nixl_agent``).

    receiver -> sender   OFFER     slot address, capacity, generation of the metadata that describes it
    sender -> receiver   ANNOUNCE  the header record with the counts, ahead of the payload
    sender -> receiver   WRITE     the sections, packed, into the slot
    sender -> receiver   DATA      once NIXL calls the write done: the data is in the slot

A sender writes only into what was offered, so a slow receiver is never overrun (flow control). Slots start at a
quarter of the worst case that the message spec states; an announced message that does not fit makes the receiver
offer a larger one, and later slots of that pair are as large. Slots are recycled. Metadata (connections, memory
keys) is exchanged through torch's store only.

Payload moves on NIXL's own thread, which sleeps until the network has something for it and needs no Python lock
(``nixl_library``). What is said about messages is Python's: a thread of ours looks every millisecond while something
is under way, and whoever waits looks too.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, Store
from torch.distributed.distributed_c10d import _get_default_store

from megatron_disagmoe.transport.base import (
    ChannelSpec,
    Message,
    MessageSpec,
    RecvHandle,
    SendHandle,
    TransferKey,
    Transport,
    TransportError,
    check_message,
    check_same_spec,
)
from megatron_disagmoe.transport.handles import lost, not_taken, nothing_came
from megatron_disagmoe.transport.nixl_agent import Agent
from megatron_disagmoe.transport.nixl_memory import Slot
from megatron_disagmoe.transport.nixl_messages import Recv, RecvPair, Send, SendPair, SendState
from megatron_disagmoe.transport.nixl_protocol import (
    ANNOUNCE,
    ANNOUNCE_BODY,
    DATA,
    ENVELOPE,
    OFFER,
    OFFER_BODY,
    PING,
    Offer,
    envelope,
    packed_offsets,
    worst_case,
)
from megatron_disagmoe.transport.nixl_writes import Writes
from megatron_disagmoe.transport.wire import Layout, Where, view_section

#: Seconds between looks: by our thread while something is under way, and when nothing is or somebody waits and looks
#: anyway; by a waiting rank (from the first to the second, doubling, so that a short wait is short and a long one
#: leaves the cores alone).
_POLL_SECONDS, _IDLE_POLL_SECONDS = 0.001, 0.02
_WAIT_POLL_SECONDS = (0.00005, 0.001)
#: How long `close` waits for peers that are not done yet.
_BYE_SECONDS = 10.0
#: How often a waiting rank checks that the peer still lives.
_PING_SECONDS = 1.0
#: Transports of one process, counted, so that a second one finds no keys of the first in the store.
_INSTANCES = itertools.count()


class NixlTransport(Transport):
    """See the module's docstring; collective over the world to create.

    Args:
        channels: every channel of the job, in the same order on every rank.
        device: where the sections live.
        timeout_seconds: how long one wait may last.
        store: where metadata is exchanged; torch.distributed's own by default.

    Raises:
        ValueError: where the package ``nixl`` is missing.
    """

    def __init__(
        self,
        channels: Sequence[ChannelSpec],
        *,
        device: torch.device,
        timeout_seconds: float,
        store: Store | None = None,
    ) -> None:
        super().__init__(channels, timeout_seconds=timeout_seconds)
        self.device = device
        self.rank = dist.get_rank()
        self._numbers = {channel.name: number for number, channel in enumerate(channels)}
        mine = [channel for channel in channels if self.rank in channel.ranks]
        self._agent = Agent(
            rank=self.rank,
            peers=sorted({rank for channel in mine for rank in channel.ranks} - {self.rank}),
            device=device,
            store=PrefixStore(f"af-nixl-{next(_INSTANCES)}", store or _get_default_store()),
        )
        self._writes = Writes(self._agent, self._fail)
        self._send_pairs: dict[tuple[int, int], SendPair] = {}
        self._recv_pairs: dict[tuple[int, int], RecvPair] = {}
        self._early: dict[tuple[int, int], list[bytes]] = {}
        self._num_expected = 0
        self._lost: dict[int, TransportError] = {}
        self._error: TransportError | None = None
        self._lock = threading.Lock()
        self._wake = threading.Event()
        self._waiting = 0
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="af-transport-nixl", daemon=True)
        self._thread.start()

    # ---- sending ----

    def send(
        self, channel: ChannelSpec, key: TransferKey, peer: int, message: Message, spec: MessageSpec
    ) -> SendHandle:
        rows = check_message(channel, key, message, spec)
        where = Where(channel, key, self.rank, peer, receiving=False)
        with self._lock:
            offsets, size = packed_offsets(spec, rows)
            self._raise_if_lost(where, peer, expected=size)
            pair = self._send_pair(channel, peer, spec)
            check_same_spec(channel, peer, pair.layout.spec, spec)
            slot = self._agent.sending.take(size) if size else None
        state = SendState(pair, where, pair.sequence, size, slot)
        if slot is not None:
            for tensor, section, count, offset in zip(message.sections, spec.sections, rows, offsets, strict=True):
                if count:
                    target = slot.buffer[offset : offset + count * section.row_bytes]
                    target.view(section.dtype).view(count, -1).copy_(tensor.detach())
            if self.device.type == "cuda":
                state.ready = torch.cuda.Event()
                state.ready.record(torch.cuda.current_stream(self.device))
        record = pair.layout.pack(key, pair.sequence, message, rows)
        body = ANNOUNCE_BODY.pack(size, pair.layout.digest) + record.numpy().tobytes()
        with self._lock:
            self._notify(peer, where, envelope(ANNOUNCE, pair.number, pair.sequence) + body, expected=size)
            pair.sequence += 1
            self.traffic[channel.name].add(spec, rows, header=len(body))
            if slot is None:
                state.done = True
            else:
                self._writes.add(state)
        self._wake.set()
        return Send(state)

    def flush(self) -> None:
        deadline = time.monotonic() + self.timeout_seconds
        for pause in self._looks():
            with self._lock:
                self._progress()
                if self._error is not None:
                    raise self._error
                waiting = self._writes.pending
            if not waiting:
                return
            if time.monotonic() > deadline:
                raise not_taken(waiting[0].where, self.timeout_seconds, waiting[0].size)
            time.sleep(pause)

    def _send_pair(self, channel: ChannelSpec, peer: int, spec: MessageSpec) -> SendPair:
        number = self._numbers[channel.name]
        pair = self._send_pairs.get((number, peer))
        if pair is None:
            pair = self._send_pairs[number, peer] = SendPair(Layout.of(spec, on_host=False), number, peer)
            self._replay(number, peer)
        return pair

    # ---- receiving ----

    def post_recv(self, channel: ChannelSpec, key: TransferKey, peer: int, spec: MessageSpec) -> RecvHandle:
        number = self._numbers[channel.name]
        with self._lock:
            pair = self._recv_pairs.get((number, peer))
            if pair is None:
                layout = Layout.of(spec, on_host=False)
                pair = RecvPair(layout, number, peer, capacity=max(1, worst_case(spec) // 4))
                self._recv_pairs[number, peer] = pair
            check_same_spec(channel, peer, pair.layout.spec, spec)
            where = Where(channel, key, self.rank, peer, receiving=True)
            recv = Recv(where, self._complete, self._give_back, key, pair)
            self._raise_if_lost(recv.where, peer, expected=worst_case(spec))
            pair.expected[recv.sequence] = recv
            pair.sequence += 1
            self._num_expected += 1
            if spec.sections:
                self._offer(recv, pair.capacity)
            self._replay(number, peer)
        self._wake.set()
        return recv

    def _offer(self, recv: Recv, size: int) -> None:
        pair = recv.pair
        recv.slot = self._agent.receiving.take(size)
        slot = recv.slot
        body = OFFER_BODY.pack(slot.address, slot.capacity, slot.generation, pair.layout.digest)
        self._notify(pair.peer, recv.where, envelope(OFFER, pair.number, recv.sequence) + body, expected=size)

    def _complete(self, recv: Recv) -> Message:
        """Wait for a whole message."""
        worst = worst_case(recv.pair.layout.spec)
        start = time.monotonic()
        ping = start + _PING_SECONDS
        for pause in self._looks():
            with self._lock:
                self._progress()
                if recv.is_here:
                    break
                now = time.monotonic()
                self._raise_if_lost(recv.where, recv.pair.peer, expected=worst)
                if now - start > self.timeout_seconds:
                    expected = worst if recv.size is None else recv.size
                    raise nothing_came(recv.where, self.timeout_seconds, expected, at_most=recv.size is None)
                if now > ping:
                    ping = now + _PING_SECONDS
                    self._notify(recv.pair.peer, recv.where, envelope(PING, 0, 0), expected=worst)
            time.sleep(pause)
        if recv.error is not None:
            raise recv.error
        assert recv.record is not None
        layout = recv.pair.layout
        message, rows = layout.unpack(recv.where, recv.key, recv.sequence, recv.record)
        offsets, size = packed_offsets(layout.spec, rows)
        if size != recv.size:
            raise TransportError(f"{recv.where}: expected {size} bytes by the counts, had {recv.size}")
        sections = [section.to(self.device) for section in message.sections]
        if recv.slot is not None:
            buffer = recv.slot.buffer
            if self.device.type == "cpu":
                recv.memory = buffer.numpy()[:]
                buffer = torch.from_numpy(recv.memory)
            for i, (offset, section) in enumerate(zip(offsets, layout.spec.sections, strict=True)):
                end = offset + rows[i] * section.row_bytes
                if rows[i]:
                    sections[i] = view_section(buffer[offset:end], layout.spec, i, rows[i])
        return Message(message.header, tuple(sections))

    def _give_back(self, slot: Slot) -> None:
        """Any thread may call it, also one that holds the lock (when the last user of a slot's memory goes)."""
        self._agent.receiving.give(slot)

    # ---- progress; the lock is held ----

    def _run(self) -> None:
        while not self._closing:
            with self._lock:
                self._progress()
                busy = bool(self._num_expected or self._writes.pending) and not self._waiting
                if not busy:
                    self._wake.clear()
            if busy:
                time.sleep(_POLL_SECONDS)
            else:
                self._wake.wait(_IDLE_POLL_SECONDS)

    def _looks(self) -> Iterator[float]:
        """Seconds to sleep between a waiting rank's looks, without end; meanwhile our thread has nothing to do."""
        self._waiting += 1
        try:
            yield from _pauses()
        finally:
            self._waiting -= 1
            self._wake.set()

    def _progress(self) -> None:
        for peer, note in self._agent.hear():
            self._take_note(peer, note)
        self._writes.progress()

    def _take_note(self, peer: int, note: bytes) -> None:
        kind, number, sequence = ENVELOPE.unpack_from(note)
        body = note[ENVELOPE.size :]
        if kind == OFFER:
            pair = self._send_pairs.get((number, peer))
            if pair is None:
                self._early.setdefault((number, peer), []).append(note)
                return
            address, capacity, generation, digest = OFFER_BODY.unpack(body)
            if digest == pair.layout.digest:  # else the announcement tells the receiver, whose error names both
                pair.offers[sequence] = Offer(address, capacity, generation)
        elif kind in (ANNOUNCE, DATA):
            recv_pair = self._recv_pairs.get((number, peer))
            recv = recv_pair.expected.get(sequence) if recv_pair is not None else None
            if recv is None:
                self._early.setdefault((number, peer), []).append(note)
            elif kind == DATA:
                recv.has_data = True
                self._settle(recv)
            else:
                self._take_announcement(recv, body)

    def _take_announcement(self, recv: Recv, body: bytes) -> None:
        size, digest = ANNOUNCE_BODY.unpack_from(body)
        layout = recv.pair.layout
        worst = worst_case(layout.spec)
        if digest != layout.digest or size > worst:
            recv.error = TransportError(
                f"{recv.where}: the peer sends messages of another shape: expected at most {worst} bytes "
                f"({layout.spec}), had {size}; start every rank with the same sizes"
            )
        else:
            recv.record = torch.frombuffer(bytearray(body[ANNOUNCE_BODY.size :]), dtype=torch.uint8)
            recv.size = size
            if recv.slot is not None and (size == 0 or size > recv.slot.capacity):
                # Nothing was or will be written into the slot: the sender waits for one that is large enough.
                self._agent.receiving.give(recv.slot)
                recv.slot = None
                if size:
                    self._offer(recv, size)
                    recv.pair.capacity = max(recv.pair.capacity, size)
        self._settle(recv)

    def _settle(self, recv: Recv) -> None:
        if recv.is_here and recv.pair.expected.pop(recv.sequence, None) is not None:
            self._num_expected -= 1

    def _replay(self, number: int, peer: int) -> None:
        """Take the notes that came before anyone here knew the pair or had posted the receive."""
        for note in self._early.pop((number, peer), []):
            self._take_note(peer, note)

    def _fail(self, state: SendState, error: Exception) -> None:
        state.error = lost(state.where, state.size, error)
        self._lost.setdefault(state.pair.peer, state.error)
        self._error = self._error or state.error

    def _notify(self, peer: int, where: Where, note: bytes, *, expected: int) -> None:
        try:
            self._agent.say(peer, note)
        except self._agent.errors as error:
            self._lost[peer] = lost(where, expected, error)
            raise self._lost[peer] from error

    def _raise_if_lost(self, where: Where, peer: int, *, expected: int) -> None:
        if self._error is not None:
            raise self._error
        if peer in self._lost:
            raise lost(where, expected, self._lost[peer])

    # ---- end ----

    def close(self) -> None:
        if self._closing:
            return
        self._closing = True
        self._wake.set()
        self._thread.join()
        if not self._lost and self._error is None:
            self._part()
        self._writes.drop()
        self._agent.close()

    def _part(self) -> None:
        """Keep progress going until every peer is done as well: UCX may still hold notifications they wait for."""
        self._agent.say_bye()
        deadline = time.monotonic() + min(self.timeout_seconds, _BYE_SECONDS)
        for pause in _pauses():
            self._progress()
            if self._agent.all_said_bye() or time.monotonic() > deadline:
                return
            time.sleep(pause)


def _pauses() -> Iterator[float]:
    """Seconds to sleep between polls, without end."""
    pause, longest = _WAIT_POLL_SECONDS
    while True:
        yield pause
        pause = min(2 * pause, longest)
