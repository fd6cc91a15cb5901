"""Interprets a schedule on one rank. It knows no schedule by name and no model: it moves messages and calls a worker.

RECV posts. A SEND right behind the action that makes its message has begun by then (a stage emits its dispatch as soon
as it exists); one that stands later starts the transfer there, and until then the message is kept. A compute action
waits for exactly the transfers that ``schedules.dataflow`` says it needs. Nothing else blocks.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from megatron_disagmoe.runtime.activations import Activations, Received
from megatron_disagmoe.runtime.links import Incoming, Links
from megatron_disagmoe.schedules.actions import Action, Group, Kind, Schedule, Side
from megatron_disagmoe.schedules.dataflow import COMPUTE, Port, inputs, outputs, redispatched
from megatron_disagmoe.schedules.liveness import lifetimes, live_counts
from megatron_disagmoe.tracing.recorder import Recorder, edge_name
from megatron_disagmoe.transport.base import Message, TransferKey

_SAID = 4
"""How many outstanding receives last words name."""

Emit = Callable[[Port, list[Message]], None]
"""Hands over one message per peer; called during a compute action, as early as the messages exist."""


class Worker(Protocol):
    """What the compute actions of one rank do."""

    activations: Activations
    """What it keeps between actions; the executor compares its number with the verifier's after every action."""

    def run(self, action: Action, received: Received, emit: Emit) -> None:
        """Run one compute action and emit everything that ``schedules.dataflow.outputs`` lists for it.

        ``received`` is the worker's to keep or to let go of.
        """


@dataclass(frozen=True, slots=True)
class _Step:
    """One action: a compute action with what it waits for, or a transfer on ``port``.

    ``live``: activations alive once it has run. ``late``: what it makes that is sent later.
    """

    action: Action
    needs: tuple[tuple[Port, bool], ...]
    port: Port | None
    live: int
    late: tuple[Port, ...] = ()


def _sent_late(schedule: Schedule, group: Group) -> set[tuple[Port, int]]:
    """Messages whose SEND does not follow its maker at once, or follows another such SEND, so that order is kept."""
    made: set[tuple[Port, int]] = set()
    late: set[tuple[Port, int]] = set()
    for action in schedule.actions[group]:
        if action.kind in COMPUTE:
            ports = outputs(group.side, action.kind, action.layer, num_layers=schedule.placement.num_layers)
            made = {(port, action.micro_batch) for port in ports}
        elif action.kind is Kind.SEND:
            assert action.edge is not None, "a transfer names its edge"
            message = Port(action.edge, action.gradient, action.layer), action.micro_batch
            if message not in made:
                late.add(message)
                made = set()
    return late


def _steps(schedule: Schedule, group: Group) -> list[_Step]:
    placement = schedule.placement
    again = redispatched(schedule) if group.side is Side.F else frozenset()
    actions = schedule.actions[group]
    lives = lifetimes(schedule)[group]
    during = live_counts(lives, len(actions))
    ending = [0] * len(actions)
    for life in lives:
        ending[life.last] += 1
    sent_late = _sent_late(schedule, group)
    steps = []
    for position, action in enumerate(actions):
        live = during[position] - ending[position]
        if action.kind in COMPUTE:
            ports = inputs(
                group.side,
                action.kind,
                action.layer,
                num_layers=placement.num_layers,
                again=(action.layer, action.micro_batch) in again,
            )
            needs = tuple((port, placement.is_local(port.edge, port.layer)) for port in ports)
            made = outputs(group.side, action.kind, action.layer, num_layers=placement.num_layers)
            late = tuple(port for port in made if (port, action.micro_batch) in sent_late)
            steps.append(_Step(action, needs, None, live, late))
        else:
            assert action.edge is not None, "a transfer names its edge"
            steps.append(_Step(action, (), Port(action.edge, action.gradient, action.layer), live))
    return steps


class Executor:
    """Runs this rank's list of a schedule."""

    def __init__(self, links: Links, recorder: Recorder) -> None:
        self.links = links
        self.recorder = recorder
        self._known: dict[int, tuple[Schedule, list[_Step]]] = {}
        self._under_way: tuple[_Run, _Step] | None = None

    def doing(self) -> str:
        """What this rank is at, for its last words: the action, and what it waits for or will."""
        if self._under_way is None:
            return "between two steps"
        run, step = self._under_way
        posted = [
            f"{TransferKey(port.edge.value, port.gradient, port.layer, micro_batch)} from rank "
            + ", ".join(map(str, incoming.peers))
            for (port, micro_batch), incoming in run.awaited()
        ]
        action = step.action
        return (
            f"at {action.kind.value} of layer {action.layer}, micro-batch {action.micro_batch}; "
            f"receives outstanding: {'; '.join(posted[:_SAID]) or 'none'}{'; ...' if len(posted) > _SAID else ''}"
        )

    def run(self, schedule: Schedule, worker: Worker) -> None:
        """Run one step and wait until everything sent has been taken.

        Args:
            schedule: lowered (``schedules.lowering.lowered``) and verified.
            worker: does the compute actions.

        Raises:
            TransportError: where a peer died or stalled, naming edge, layer, micro-batch and peer.
            AssertionError: where the worker keeps more than the verifier counted.
        """
        if id(schedule) not in self._known:
            self._known[id(schedule)] = schedule, _steps(schedule, self.links.role.group)
        _, steps = self._known[id(schedule)]
        run = _Run(self.links, self.recorder, schedule)
        for step in steps:
            self._under_way = run, step
            if step.port is None:
                run.compute(step, worker)
                live = len(worker.activations)
                assert live == step.live, f"after {step.action} {live} activations live, verified were {step.live}"
            elif step.action.kind is Kind.RECV:
                run.post(step.port, step.action.micro_batch)
            else:
                run.sent(step.port, step.action.micro_batch)
        run.finish()
        self.links.finish()
        self._under_way = None


class _Run:
    """What is under way during one step."""

    def __init__(self, links: Links, recorder: Recorder, schedule: Schedule) -> None:
        self.links = links
        self.recorder = recorder
        self.placement = schedule.placement
        self.incoming: dict[tuple[Port, int], Incoming] = {}
        self.handed_over: dict[tuple[Port, int], list[Message]] = {}
        self.emitted: set[tuple[Port, int]] = set()
        self.kept: dict[tuple[Port, int], list[Message]] = {}

    def post(self, port: Port, micro_batch: int) -> None:
        """Get ready to receive."""
        self.incoming[port, micro_batch] = self.links.receive(port, micro_batch)

    def sent(self, port: Port, micro_batch: int) -> None:
        """A SEND: starts the transfer of a message that was kept; that of any other has begun."""
        if (messages := self.kept.pop((port, micro_batch), None)) is not None:
            self.links.send(port, micro_batch, messages)
            return
        assert (port, micro_batch) in self.emitted, f"{port} of micro-batch {micro_batch} is sent before it is made"
        self.emitted.remove((port, micro_batch))

    def compute(self, step: _Step, worker: Worker) -> None:
        """Wait for the inputs of a compute action and run it."""
        micro_batch = step.action.micro_batch
        received = {port: self._take(port, micro_batch, is_local=is_local) for port, is_local in step.needs}

        def emit(port: Port, messages: list[Message]) -> None:
            if self.placement.is_local(port.edge, port.layer):
                self.handed_over[port, micro_batch] = messages
            elif port in step.late:
                self.kept[port, micro_batch] = messages
            else:
                self.links.send(port, micro_batch, messages)
                self.emitted.add((port, micro_batch))

        if not self.recorder.enabled:
            worker.run(step.action, received, emit)
            return
        start = time.perf_counter_ns()
        worker.run(step.action, received, emit)
        self.recorder.compute(step.action, start, time.perf_counter_ns())

    def _take(self, port: Port, micro_batch: int, *, is_local: bool) -> list[Message]:
        if is_local:
            return self.handed_over.pop((port, micro_batch))
        incoming = self.incoming[port, micro_batch]
        start = time.perf_counter_ns()
        messages = incoming.wait()
        del self.incoming[port, micro_batch]
        if not self.recorder.enabled:
            return messages
        name, end = edge_name(port.edge, port.gradient), time.perf_counter_ns()
        self.recorder.wait(name, port.layer, micro_batch, incoming.peers[0], start, end)
        for peer, message in zip(incoming.peers, messages, strict=True):
            self.recorder.receive(name, port.layer, micro_batch, peer, incoming.posted_ns, end, message.num_bytes)
        return messages

    def awaited(self) -> list[tuple[tuple[Port, int], Incoming]]:
        """Receives whose message has not been taken, oldest first."""
        return list(self.incoming.items())

    def finish(self) -> None:
        """A verified schedule leaves nothing over."""
        left = [*self.incoming, *self.handed_over, *self.emitted, *self.kept]
        assert not left, f"the schedule ended with transfers left over: {left[:3]}"
