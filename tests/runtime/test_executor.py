"""The interpreter, with workers that only check what they are given."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_disagmoe import builders
from megatron_disagmoe.runtime.activations import Activations, Received
from megatron_disagmoe.runtime.executor import Emit
from megatron_disagmoe.schedules.actions import Action, Edge, Group, Kind, Placement, Schedule, Side
from megatron_disagmoe.schedules.dataflow import COMPUTE, Port, inputs, outputs, redispatched
from megatron_disagmoe.schedules.text import loads
from megatron_disagmoe.schedules.verifier import FaultKind, ensure_safe, verify
from megatron_disagmoe.topology import Role, Topology
from megatron_disagmoe.transport.base import Message, TransferKey
from tests.runtime.pipe import Pipe
from tests.runtime.redispatch import redispatching
from tests.schedules.strategies import sent_late

_EDGES = list(Edge)


def _token(port: Port, micro_batch: int, source: Role, target: int) -> Message:
    """A message that says what it is."""
    words = [_EDGES.index(port.edge), int(port.gradient), port.layer, micro_batch, source.index, target]
    rows = torch.tensor(words, dtype=torch.float32).view(-1, 1).repeat(1, 4)
    if port.edge is Edge.LANE and not port.gradient:
        return Message(torch.zeros(3, dtype=torch.int64), (rows, torch.zeros(0, 1, dtype=torch.int64)))
    return Message(torch.zeros(0, dtype=torch.int64), (rows,))


class CheckingWorker:
    """Checks every input and counts what it is asked to do."""

    def __init__(self, schedule: Schedule, topology: Topology, role: Role) -> None:
        self.schedule, self.topology, self.role = schedule, topology, role
        self.again = redispatched(schedule) if role.group.side is Side.F else frozenset()
        self.activations = Activations()
        self.done: list[Action] = []

    def run(self, action: Action, received: Received, emit: Emit) -> None:
        kind, layer, micro_batch = action.kind, action.layer, action.micro_batch
        side, layers = self.role.group.side, self.schedule.placement.num_layers
        again = (layer, micro_batch) in self.again
        expected = inputs(side, kind, layer, num_layers=layers, again=again)
        assert tuple(received) == expected
        for port, messages in received.items():
            for source, message in zip(self._peers(port), messages, strict=True):
                token = _token(port, micro_batch, self.topology.role(source), self.role.index)
                assert torch.equal(message.sections[0], token.sections[0]), (action, port)
        self._count(kind, layer, micro_batch, again=again)
        self.done.append(action)
        for port in outputs(side, kind, layer, num_layers=layers):
            peers = self._peers(port)
            emit(port, [_token(port, micro_batch, self.role, self.topology.role(peer).index) for peer in peers])

    def _peers(self, port: Port) -> tuple[int, ...]:
        if self.schedule.placement.is_local(port.edge, port.layer):
            return (self.topology.ranks(self.role.group, 0)[self.role.index],)
        return self.topology.peers(self.role, port.edge, port.layer, gradient=port.gradient)

    def _count(self, kind: Kind, layer: int, micro_batch: int, *, again: bool) -> None:
        if kind is Kind.F or (again and kind in (Kind.B, Kind.I)):
            self.activations.begin(layer, micro_batch)
        if kind in (Kind.B, Kind.W) or (kind is Kind.F and (again or self.schedule.forward_only)):
            self.activations.end(layer, micro_batch)


def _pipe(schedule: Schedule, *, attention_ranks: int = 1, ffn_ranks: int = 1) -> Pipe:
    topology = Topology(schedule.placement, attention_ranks, ffn_ranks, 1, redispatch=bool(redispatched(schedule)))
    return Pipe(schedule, lambda role: CheckingWorker(schedule, topology, role), attention_ranks, ffn_ranks)


def _build(kind: str, p_attention: int, p_ffn: int, layers: int, n: int, *, forward_only: bool = False) -> Schedule:
    placement = Placement.round_robin(
        num_layers=layers, num_attention_groups=p_attention, num_ffn_groups=p_ffn
    )
    costs = builders.NOMINAL_COSTS
    return builders.build(kind, placement, num_micro_batches=n, costs=costs, forward_only=forward_only)


@settings(max_examples=30, deadline=None)
@given(
    kind=st.sampled_from(builders.KINDS),
    p_attention=st.integers(1, 3),
    p_ffn=st.integers(1, 3),
    more_layers=st.integers(0, 3),
    n=st.integers(1, 9),
    forward_only=st.booleans(),
    again=st.booleans(),
    attention_ranks=st.integers(1, 2),
    ffn_ranks=st.integers(1, 3),
)
def test_every_stage_gets_what_it_needs(
    kind: str,
    p_attention: int,
    p_ffn: int,
    more_layers: int,
    n: int,
    forward_only: bool,
    again: bool,
    attention_ranks: int,
    ffn_ranks: int,
) -> None:
    layers = max(p_attention, p_ffn) + more_layers
    schedule = _build(kind, p_attention, p_ffn, layers, n, forward_only=forward_only)
    if again and not forward_only:
        schedule = redispatching(schedule)
    report = ensure_safe(schedule)
    pipe = _pipe(report.schedule, attention_ranks=attention_ranks, ffn_ranks=ffn_ranks)
    workers = pipe.run(steps=2)
    for role, steps in workers.items():
        for worker in steps:
            assert isinstance(worker, CheckingWorker)
            mine = report.schedule.actions[role.group]
            assert worker.done == [action for action in mine if action.kind in COMPUTE]
            assert worker.activations.high_water == report.peak_live[role.group]
    for channel, posted in report.peak_posted.items():
        name = f"{channel.edge.value}{'.grad' if channel.gradient else ''} {channel.sender}->{channel.receiver} r0"
        assert pipe.wires.most_posted[name] <= posted


_built = st.builds(
    _build, st.sampled_from(builders.KINDS), st.integers(1, 2), st.integers(1, 2), st.integers(2, 4), st.integers(1, 6)
)


@settings(max_examples=40, deadline=None)
@given(sent_late(_built))
def test_messages_are_sent_where_their_send_stands(schedule: Schedule) -> None:
    """Late or not: the messages of every edge are sent in the order of the list, and land in the receives they name."""
    report = verify(schedule)
    if not report.ok:
        assert report.counts.keys() == {FaultKind.DEADLOCK}  # sent too late
        return
    pipe = _pipe(report.schedule)
    pipe.run()
    for group, actions in report.schedule.actions.items():
        sends = [action for action in actions if action.kind is Kind.SEND]
        expected = [TransferKey(s.edge.value, s.gradient, s.layer, s.micro_batch) for s in sends if s.edge is not None]
        sent = pipe.wires.sent.get(pipe.topology.ranks(group, 0)[0], [])
        for edge in {(key.edge, key.gradient) for key in (*expected, *sent)}:  # an action's two messages may swap
            in_list, found = ([key for key in keys if (key.edge, key.gradient) == edge] for keys in (expected, sent))
            assert found == in_list


def test_a_late_message_is_kept_until_its_send() -> None:
    """The dispatch of micro-batch 0 leaves after the tail's gradient of micro-batch 1."""
    schedule = ensure_safe(
        loads(
            "disagmoe-schedule 1\nattention-groups 1\nffn-groups 1\nmicro-batches 2\nforward-only no\nattention 0 0\n"
            "ffn 0\nA0: F0.0 F0.1 F1.1 B1.1 >dN2M/0.1 >M2N/0.0 F1.0 B1.0 B0.1 B0.0\nF0: F0.1 B0.1 F0.0 B0.0\n"
        )
    ).schedule
    pipe = _pipe(schedule)
    pipe.run()
    a0 = pipe.topology.ranks(Group(Side.A, 0), 0)[0]
    assert [(key.edge, key.gradient, key.micro_batch) for key in pipe.wires.sent[a0]] == [
        ("M2N", False, 1),
        ("N2M", True, 1),
        ("M2N", False, 0),
        ("N2M", True, 0),
    ]


def test_a_custom_placement_runs() -> None:
    """Layers two by two, the tail on a group of its own."""
    placement = Placement(3, 2, (0, 0, 1, 1, 2), (1, 1, 0, 0))
    schedule = builders.build("sequential", placement, num_micro_batches=3, costs=builders.NOMINAL_COSTS)
    _pipe(ensure_safe(schedule).schedule).run()


def test_a_worker_that_keeps_too_much_is_found() -> None:
    schedule = ensure_safe(_build("interleaved-1f1b", 1, 1, 2, 3)).schedule
    pipe = _pipe(schedule)
    make = pipe.worker

    class Hoarder(CheckingWorker):
        def _count(self, kind: Kind, layer: int, micro_batch: int, *, again: bool) -> None:
            if kind is Kind.F:
                self.activations.begin(layer, micro_batch)

    topology = Topology(schedule.placement, 1, 1, 1)
    pipe.worker = lambda role: Hoarder(schedule, topology, role) if role.group.side is Side.F else make(role)
    with pytest.raises(AssertionError, match=r"live, verified were"):
        pipe.run()


def test_a_send_that_nothing_made_is_found() -> None:
    schedule = ensure_safe(_build("sequential", 1, 1, 1, 1)).schedule
    actions = {
        group: tuple(sorted(mine, key=lambda action: action.kind is not Kind.SEND))
        for group, mine in schedule.actions.items()
    }
    with pytest.raises(AssertionError, match="is sent before it is made"):
        _pipe(dataclasses.replace(schedule, actions=actions)).run()


def test_what_is_left_over_is_found() -> None:
    schedule = ensure_safe(_build("sequential", 1, 1, 1, 1)).schedule
    actions = {
        group: tuple(action for action in mine if action.kind is not Kind.SEND)
        for group, mine in schedule.actions.items()
    }
    with pytest.raises(AssertionError, match="left over"):
        _pipe(dataclasses.replace(schedule, actions=actions)).run()
