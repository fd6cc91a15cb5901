"""A whole pipe in one process: one thread a rank, an in-memory transport, one rank running at a time.

The transport is as strict as they come: the k-th receive posted on a channel gets the k-th message sent, whatever that
is, and its key must fit. A rank hands the baton on only while it waits, so that what is tested is the schedule and not
the scheduler of the operating system.
"""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch

from megatron_disagmoe.runtime.executor import Executor, Worker
from megatron_disagmoe.runtime.links import EdgeSpecs, Links, channel_specs
from megatron_disagmoe.schedules.actions import Edge, Schedule
from megatron_disagmoe.schedules.dataflow import redispatched
from megatron_disagmoe.topology import Role, Topology
from megatron_disagmoe.tracing.recorder import NullRecorder
from megatron_disagmoe.transport.base import (
    ChannelSpec,
    Message,
    MessageSpec,
    RecvHandle,
    Section,
    SendHandle,
    TransferKey,
    Transport,
    check_message,
)

TIMEOUT_SECONDS = 20.0


@dataclass
class Wire:
    """One channel between two ranks: messages that nobody has posted for, receives that nothing has come for."""

    sent: deque[tuple[TransferKey, Message]] = field(default_factory=deque)
    posted: deque[_Posted] = field(default_factory=deque)
    outstanding: int = 0

    def match(self) -> None:
        while self.sent and self.posted:
            handle, (key, message) = self.posted.popleft(), self.sent.popleft()
            assert key == handle.key, f"{key} arrived where {handle.key} was posted"
            handle.message = message


class Wires:
    """What is under way between the ranks of one pipe, and the baton."""

    def __init__(self) -> None:
        self.baton = threading.Condition()
        self.wires: dict[tuple[str, int, int], Wire] = {}
        self.most_posted: dict[str, int] = {}
        self.sent: dict[int, list[TransferKey]] = {}
        self.failed = False

    def between(self, channel: ChannelSpec, source: int, target: int) -> Wire:
        return self.wires.setdefault((channel.name, source, target), Wire())


class LocalTransport(Transport):
    """One rank's end."""

    def __init__(self, channels: list[ChannelSpec], wires: Wires, rank: int) -> None:
        super().__init__(channels, timeout_seconds=TIMEOUT_SECONDS)
        self.wires, self.rank = wires, rank

    def send(
        self, channel: ChannelSpec, key: TransferKey, peer: int, message: Message, spec: MessageSpec
    ) -> SendHandle:
        check_message(channel, key, message, spec)
        wire = self.wires.between(channel, self.rank, peer)
        self.wires.sent.setdefault(self.rank, []).append(key)
        wire.sent.append((key, message))
        wire.match()
        self.wires.baton.notify_all()
        return _Sent()

    def post_recv(self, channel: ChannelSpec, key: TransferKey, peer: int, spec: MessageSpec) -> RecvHandle:
        wire = self.wires.between(channel, peer, self.rank)
        wire.outstanding += 1
        most = self.wires.most_posted
        most[channel.name] = max(most.get(channel.name, 0), wire.outstanding)
        handle = _Posted(self.wires, wire, key)
        wire.posted.append(handle)
        wire.match()
        return handle

    def flush(self) -> None: ...

    def close(self) -> None: ...


class _Sent(SendHandle):
    def wait(self) -> None: ...


class _Posted(RecvHandle):
    def __init__(self, wires: Wires, wire: Wire, key: TransferKey) -> None:
        self.wires, self.wire, self.key = wires, wire, key
        self.message: Message | None = None

    def wait(self) -> Message:
        wires = self.wires
        here = wires.baton.wait_for(lambda: self.message is not None or wires.failed, TIMEOUT_SECONDS)
        assert here, f"{self.key} never came"
        assert self.message is not None, "another rank failed"
        return self.message

    def take(self) -> Message:
        message = self.wait()
        self.message = None
        self.wire.outstanding -= 1
        return message

    def release(self) -> None: ...


def specs(width: int = 4) -> EdgeSpecs:
    """Every edge carries one section of at most 64 rows; a lane is ``runtime.lane``'s with the same width."""
    rows = Section(torch.float32, width, 64, hidden=True)
    indices = Section(torch.int64, 1, 64, differentiable=False)
    plain, lane = MessageSpec(0, (rows,)), MessageSpec(3, (rows, indices))
    return EdgeSpecs(
        {(edge, gradient): plain for edge in Edge for gradient in (False, True)} | {(Edge.LANE, False): lane}
    )


@dataclass
class Pipe:
    """All ranks of one schedule; ``worker`` makes the worker of a role."""

    schedule: Schedule
    worker: Callable[[Role], Worker]
    attention_ranks: int = 1
    ffn_ranks: int = 1
    edge_specs: EdgeSpecs = field(default_factory=specs)

    @property
    def topology(self) -> Topology:
        """One replica."""
        return Topology(
            placement=self.schedule.placement,
            attention_ranks=self.attention_ranks,
            ffn_ranks=self.ffn_ranks,
            replicas=1,
            redispatch=bool(redispatched(self.schedule)),
        )

    def run(self, *, steps: int = 1) -> dict[Role, list[Worker]]:
        """Run the schedule on every rank; the workers of each step.

        Raises:
            Exception: the first that a rank raised.
        """
        topology = self.topology
        self.wires = Wires()
        errors: list[Exception] = []
        workers: dict[Role, list[Worker]] = {}
        channels = channel_specs(topology)

        def rank(number: int) -> None:
            role = topology.role(number)
            with self._baton(errors):
                links = Links(topology, role, LocalTransport(channels, self.wires, number), self.edge_specs)
                executor = Executor(links, NullRecorder())
                workers[role] = []
                for _ in range(steps):
                    workers[role].append(self.worker(role))
                    executor.run(self.schedule, workers[role][-1])

        threads = [threading.Thread(target=rank, args=(number,), daemon=True) for number in range(topology.world_size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if errors:
            raise errors[0]
        assert not any(wire.sent or wire.posted for wire in self.wires.wires.values()), "something was left on a wire"
        return workers

    @contextlib.contextmanager
    def _baton(self, errors: list[Exception]) -> Iterator[None]:
        with self.wires.baton:
            try:
                yield
            except Exception as error:  # noqa: BLE001  # the test looks at it
                errors.append(error)
                self.wires.failed = True
            finally:
                self.wires.baton.notify_all()
