"""Interprets a schedule on one rank. It knows no schedule by name and no model: it moves messages and calls a worker.

RECV posts, SEND has begun by the time it stands in the list (a stage emits its dispatch as soon as it exists), and
a compute action waits for exactly the transfers that ``schedules.dataflow`` says it needs.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Protocol

from megatron_disagmoe.runtime.links import Incoming, Links
from megatron_disagmoe.schedules.actions import Action, Kind, Schedule
from megatron_disagmoe.schedules.dataflow import COMPUTE, Port, inputs
from megatron_disagmoe.tracing.recorder import Recorder, edge_name
from megatron_disagmoe.transport.base import Message

Received = dict[Port, list[Message]]
"""Messages by the port they came through, one per peer."""

Emit = Callable[[Port, list[Message]], None]
"""Hands over one message per peer; called during a compute action, as early as the messages exist."""


class Worker(Protocol):
    """What the compute actions of one rank do."""

    def run(self, action: Action, received: Received, emit: Emit) -> None:
        """Run one compute action and emit everything that ``schedules.dataflow.outputs`` lists for it."""


class Executor:
    """Runs this rank's list of a schedule."""

    def __init__(self, links: Links, recorder: Recorder) -> None:
        self.links = links
        self.recorder = recorder

    def run(self, schedule: Schedule, worker: Worker) -> None:
        """Run one step and wait until everything sent has been taken.

        Args:
            schedule: lowered (``schedules.lowering.lowered``) and verified.
            worker: does the compute actions.

        Raises:
            TransportError: where a peer died or stalled, naming edge, layer, micro-batch and peer.
        """
        group = self.links.role.group
        step = _Step(self.links, self.recorder, schedule)
        for action in schedule.actions[group]:
            if action.kind in COMPUTE:
                step.compute(action, worker)
            else:
                step.transfer(action)
        step.finish()
        self.links.transport.flush()


class _Step:
    """What is under way during one step."""

    def __init__(self, links: Links, recorder: Recorder, schedule: Schedule) -> None:
        self.links = links
        self.recorder = recorder
        self.placement = schedule.placement
        self.side = links.role.group.side
        self.incoming: dict[tuple[Port, int], Incoming] = {}
        self.handed_over: dict[tuple[Port, int], list[Message]] = {}
        self.emitted: set[tuple[Port, int]] = set()

    def transfer(self, action: Action) -> None:
        assert action.edge is not None, "a transfer names its edge"
        port = Port(action.edge, action.gradient, action.layer)
        item = (port, action.micro_batch)
        if action.kind is Kind.RECV:
            self.incoming[item] = self.links.receive(port, action.micro_batch)
        else:
            assert item in self.emitted, f"{action} stands before the compute action that makes it"
            self.emitted.remove(item)

    def compute(self, action: Action, worker: Worker) -> None:
        micro_batch = action.micro_batch
        received = {
            port: self._take(port, micro_batch)
            for port in inputs(self.side, action.kind, action.layer, num_layers=self.placement.num_layers)
        }

        def emit(port: Port, messages: list[Message]) -> None:
            if self.placement.is_local(port.edge, port.layer):
                self.handed_over[port, micro_batch] = messages
            else:
                self.links.send(port, micro_batch, messages)
                self.emitted.add((port, micro_batch))

        if not self.recorder.enabled:
            worker.run(action, received, emit)
            return
        start = time.perf_counter_ns()
        worker.run(action, received, emit)
        self.recorder.compute(action, start, time.perf_counter_ns())

    def _take(self, port: Port, micro_batch: int) -> list[Message]:
        if self.placement.is_local(port.edge, port.layer):
            return self.handed_over.pop((port, micro_batch))
        incoming = self.incoming.pop((port, micro_batch))
        if not self.recorder.enabled:
            return incoming.wait()
        start = time.perf_counter_ns()
        messages = incoming.wait()
        name = edge_name(port.edge, port.gradient)
        self.recorder.wait(name, port.layer, micro_batch, incoming.peers[0], start, time.perf_counter_ns())
        return messages

    def finish(self) -> None:
        """A verified schedule leaves nothing over."""
        left = [*self.incoming, *self.handed_over, *self.emitted]
        assert not left, f"the schedule ended with transfers left over: {left[:3]}"
