"""From compute-only schedules to executable ones: derive the sends and receives, then post receives early.

Two passes, so that authors write compute actions only::

    schedule = post_receives(add_communication(compute_only_schedule))

An author may also write SENDs: of messages that are to leave later than when they are made, so that more urgent ones
go first. Those stay where they stand.

Both are total: a broken schedule is lowered as far as it goes and the verifier says what is wrong.
"""

from __future__ import annotations

import dataclasses
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple

from megatron_disagmoe.schedules.actions import Action, Edge, Group, Kind, Schedule, Side
from megatron_disagmoe.schedules.dataflow import (
    COMPUTE,
    Channel,
    Port,
    channel_of,
    inputs,
    outputs,
    redispatched,
)

#: Nominal times that decide how early a receive is posted; safety does not depend on them, only buffer counts do.
_NOMINAL_TIME = {Kind.F: 1.0, Kind.B: 2.0, Kind.I: 1.0, Kind.W: 1.0, Kind.D: 0.0}
_NOMINAL_TRANSFER = 0.5


class _Step(NamedTuple):
    """What a compute action waits for and makes, as numbers of ports, and its nominal time."""

    needs: tuple[int, ...]
    makes: tuple[int, ...]
    time: float


_NO_SUCH_STAGE = _Step((), (), 0.0)


class _Wiring:
    """Ports of a schedule as small integers, and what every stage needs from and makes for other groups.

    An *item* is one port's message of one micro-batch in one integer, which hashes faster than a tuple. Enum members
    are looked up by identity for the same reason: their hash is Python code.
    """

    def __init__(self, schedule: Schedule) -> None:
        self.placement = schedule.placement
        self.again = redispatched(schedule)
        self.ports: list[Port] = []
        self.channels: list[Channel] = []
        self.channel_of_port: list[int] = []
        self._port_number: dict[tuple[int, bool, int], int] = {}
        self._channel_number: dict[Channel, int] = {}
        self._steps = {
            (side, again): {id(kind): self._steps_of_kind(side, kind, again) for kind in COMPUTE}
            for side in Side
            for again in (False, True)
        }

    def _steps_of_kind(self, side: Side, kind: Kind, again: bool) -> list[_Step]:
        layers = self.placement.num_layers
        return [
            _Step(
                self._numbers(inputs(side, kind, layer, num_layers=layers, again=again)),
                self._numbers(outputs(side, kind, layer, num_layers=layers)),
                _NOMINAL_TIME[kind],
            )
            for layer in range(layers + (side is Side.A))
        ]

    def _numbers(self, ports: Iterable[Port]) -> tuple[int, ...]:
        return tuple(self._number(port) for port in ports if not self.placement.is_local(port.edge, port.layer))

    def _number(self, port: Port) -> int:
        key = id(port.edge), port.gradient, port.layer
        if key not in self._port_number:
            self._port_number[key] = len(self.ports)
            self.ports.append(port)
            channel = self._channel_number.setdefault(channel_of(self.placement, port), len(self.channels))
            if channel == len(self.channels):
                self.channels.append(channel_of(self.placement, port))
            self.channel_of_port.append(channel)
        return self._port_number[key]

    def steps(self, group: Group, computes: Iterable[Action]) -> list[_Step]:
        """What each compute action of a group needs and makes; nothing where there is no such stage."""
        plain, repeated = self._steps[group.side, False], self._steps[group.side, True]
        again = self.again if group.side is Side.F else frozenset()
        result = []
        for kind, layer, micro_batch, _, _ in computes:
            steps = (repeated if again and (layer, micro_batch) in again else plain)[id(kind)]
            result.append(steps[layer] if 0 <= layer < len(steps) else _NO_SUCH_STAGE)
        return result

    def port(self, edge: Edge | None, gradient: bool, layer: int) -> int | None:
        """Number of the port that a transfer names; None where no stage needs it."""
        return self._port_number.get((id(edge), gradient, layer))


def _item(port: int, micro_batch: int) -> int:
    return (port << 32) + micro_batch


def compute_only(schedule: Schedule) -> Schedule:
    """``schedule`` without its sends and receives."""
    return dataclasses.replace(
        schedule,
        actions={
            group: tuple(action for action in actions if action.kind is not Kind.SEND and action.kind is not Kind.RECV)
            for group, actions in schedule.actions.items()
        },
    )


def lowered(schedule: Schedule) -> Schedule:
    """``schedule`` as it runs: with its transfers derived where it has no RECV at all, else as it is."""
    if any(action.kind is Kind.RECV for actions in schedule.actions.values() for action in actions):
        return schedule
    return post_receives(add_communication(schedule))


def add_communication(schedule: Schedule) -> Schedule:
    """Derive every transfer: SEND right after the compute that makes it, RECV just before the one that needs it.

    A SEND that stands later than that in ``schedule`` stays there; RECVs in ``schedule`` are replaced. On each channel
    receives are posted in the order of the sends. Where a consumer needs a later message first, the earlier ones are
    therefore received ahead of their own consumers.
    """
    wiring = _Wiring(schedule)
    sent: list[list[Action]] = [[] for _ in wiring.channels]  # the receives of each channel in the order of its sends
    place: dict[int, int] = {}  # of each item among the sends of its channel
    with_sends: dict[Group, tuple[Action, ...]] = {}
    steps: dict[Group, list[_Step]] = {}
    for group, actions in schedule.actions.items():
        computes = [action for action in actions if action.kind is not Kind.SEND and action.kind is not Kind.RECV]
        steps[group] = wiring.steps(group, computes)
        if len(computes) == len(actions):
            with_sends[group] = actions = _sent_at_once(computes, steps[group], wiring)
        else:
            with_sends[group] = actions = _sent_as_written(actions, steps[group], wiring)
        made: set[int] = set()
        at = iter(steps[group])
        for kind, layer, micro_batch, edge, gradient in actions:
            if kind is not Kind.SEND:
                made.update(_item(port, micro_batch) for port in next(at).makes)
                continue
            port = wiring.port(edge, gradient, layer)
            if port is not None and (item := _item(port, micro_batch)) in made and item not in place:
                order = sent[wiring.channel_of_port[port]]
                place[item] = len(order)
                order.append(_transfer(Kind.RECV, wiring.ports[port], micro_batch))
    received = [0] * len(wiring.channels)
    return dataclasses.replace(
        schedule,
        actions={
            group: _with_receives(actions, steps[group], wiring, sent, place, received)
            for group, actions in with_sends.items()
        },
    )


def _sent_at_once(computes: Iterable[Action], steps: list[_Step], wiring: _Wiring) -> tuple[Action, ...]:
    """One group's list with every SEND behind its maker."""
    result: list[Action] = []
    for action, step in zip(computes, steps, strict=True):
        result.append(action)
        result.extend(_transfer(Kind.SEND, wiring.ports[port], action.micro_batch) for port in step.makes)
    return tuple(result)


def _sent_as_written(actions: Iterable[Action], steps: list[_Step], wiring: _Wiring) -> tuple[Action, ...]:
    """The same where some SENDs are written: those stay, faulty ones too, and the others are added."""
    to_come = Counter(action for action in actions if action.kind is Kind.SEND)
    result: list[Action] = []
    at = iter(steps)
    for action in actions:
        if action.kind is Kind.RECV:
            continue
        result.append(action)
        if action.kind is Kind.SEND:
            to_come[action] -= 1
            continue
        sends = (_transfer(Kind.SEND, wiring.ports[port], action.micro_batch) for port in next(at).makes)
        result.extend(send for send in sends if not to_come[send])
    return tuple(result)


def _transfer(kind: Kind, port: Port, micro_batch: int) -> Action:
    return Action(kind, port.layer, micro_batch, port.edge, port.gradient)


def _with_receives(
    actions: tuple[Action, ...],
    steps: list[_Step],
    wiring: _Wiring,
    sent: list[list[Action]],
    place: dict[int, int],
    received: list[int],
) -> tuple[Action, ...]:
    """One group's list with its receives; ``received`` counts, per channel, the receives emitted so far."""
    result: list[Action] = []
    at = iter(steps)
    for action in actions:
        if action.kind is Kind.SEND:
            result.append(action)
            continue
        micro_batch = action.micro_batch
        for port in next(at).needs:
            position = place.get(_item(port, micro_batch))
            if position is None:  # nobody makes it; keep the receive so that the verifier can name it
                result.append(_transfer(Kind.RECV, wiring.ports[port], micro_batch))
                continue
            channel = wiring.channel_of_port[port]
            if position >= received[channel]:
                result.extend(sent[channel][received[channel] : position + 1])
                received[channel] = position + 1
        result.append(action)
    return tuple(result)


def post_receives(schedule: Schedule, *, ahead: int = 2) -> Schedule:
    """Move every RECV to before the ``ahead`` compute actions in front of it, or earlier.

    A RECV goes earlier still where its message is sent earlier in a nominal run (forward 1, backward 2, transfer 0.5):
    it then stands before the first compute action that ends after the one that the SEND follows. This is what makes
    the result free of rendezvous deadlock: run in order of nominal end times, every SEND finds its RECV posted. Order
    on each channel is kept.

    Args:
        schedule: with the transfers of ``add_communication``.
        ahead: compute actions between a receive and where it stood, at least (the start of the list allowing); 0 leaves
            only what rendezvous asks for.

    Raises:
        ValueError: where ``ahead`` is negative.
    """
    if ahead < 0:
        raise ValueError(f"ahead is {ahead}; a receive cannot be posted after its consumer: use 0 or more")
    wiring = _Wiring(schedule)
    ends, produced = _nominal_run(schedule, wiring)
    return dataclasses.replace(
        schedule,
        actions={
            group: _reposted(actions, wiring, ends[group], produced, ahead)
            for group, actions in schedule.actions.items()
        },
    )


_End = tuple[float, int]
"""When a compute action ended in the nominal run, and how many had been taken before it: a total order."""


def _nominal_run(schedule: Schedule, wiring: _Wiring) -> tuple[dict[Group, list[_End]], dict[int, _End]]:
    """Run the compute actions with sends that never block: their ends, and of every item that of what it is sent after.

    Actions that can never start are left out.
    """
    todo = {group: _nominal_steps(group, actions, wiring) for group, actions in schedule.actions.items()}
    ends: dict[Group, list[_End]] = {group: [] for group in todo}
    produced: dict[int, _End] = {}
    waiting: dict[int, Group] = {}
    ready = list(reversed(todo))
    taken = 0
    while ready:
        group = ready.pop()
        mine, done = todo[group], ends[group]
        now = done[-1][0] if done else 0.0
        for position in range(len(done), len(mine)):
            micro_batch, needs, sends, time = mine[position]
            for port in needs:
                item = (port << 32) + micro_batch
                if item not in produced:
                    break
                arrival = produced[item][0] + _NOMINAL_TRANSFER
                if arrival > now:
                    now = arrival
            else:
                now += time
                taken += 1
                end = now, taken
                done.append(end)
                for item in sends:
                    produced.setdefault(item, end)
                    if item in waiting:
                        ready.append(waiting.pop(item))
                continue
            waiting[item] = group
            break
    return ends, produced


def _nominal_steps(
    group: Group, actions: Iterable[Action], wiring: _Wiring
) -> list[tuple[int, tuple[int, ...], list[int], float]]:
    """Of every compute action its micro-batch, the ports it needs, the items sent after it, and its time."""
    computes: list[Action] = []
    sends: list[list[int]] = []
    for action in actions:
        kind, layer, micro_batch, edge, gradient = action
        if kind is Kind.SEND:
            port = wiring.port(edge, gradient, layer)
            if sends and port is not None:
                sends[-1].append((port << 32) + micro_batch)
        elif kind is not Kind.RECV:
            computes.append(action)
            sends.append([])
    steps = wiring.steps(group, computes)
    return [
        (action.micro_batch, step.needs, sent, step.time)
        for action, step, sent in zip(computes, steps, sends, strict=True)
    ]


def _reposted(
    actions: tuple[Action, ...], wiring: _Wiring, ends: list[_End], produced: dict[int, _End], ahead: int
) -> tuple[Action, ...]:
    """One group's list with its receives moved."""
    slots: list[list[Action]] = [[]]  # slots[k]: the sends between compute k-1 and compute k
    computes: list[Action] = []
    receives: list[tuple[Action, int, int | None]] = []  # with the slot it goes to, and its channel
    for action in actions:
        kind, layer, micro_batch, edge, gradient = action
        if kind is Kind.RECV:
            slot, channel = max(0, len(computes) - ahead), None
            port = wiring.port(edge, gradient, layer)
            if port is not None:
                channel = wiring.channel_of_port[port]
                made = produced.get((port << 32) + micro_batch)
                if made is not None:
                    slot = min(slot, bisect_right(ends, made))
            receives.append((action, slot, channel))
        elif kind is Kind.SEND:
            slots[-1].append(action)
        else:
            computes.append(action)
            slots.append([])
    posted: list[list[Action]] = [[] for _ in slots]
    earliest: dict[int | None, int] = {}
    for action, slot, channel in reversed(receives):  # from the back: nothing may overtake on its channel
        earliest[channel] = slot = min(slot, earliest.get(channel, slot))
        posted[slot].append(action)
    result: list[Action] = []
    for sends, receives_here, compute in zip(slots, posted, [*computes, None], strict=True):
        result += sends
        result += reversed(receives_here)
        if compute is not None:
            result.append(compute)
    return tuple(result)
