"""From compute-only schedules to executable ones: derive the sends and receives, then post receives early.

Two passes, so that authors write compute actions only::

    schedule = post_receives(add_communication(compute_only_schedule))

Both are total: a broken schedule is lowered as far as it goes and the verifier says what is wrong.
"""

from __future__ import annotations

import dataclasses
from bisect import bisect_right
from collections.abc import Iterable

from megatron_disagmoe.schedules.actions import Action, Group, Kind, Schedule, Side
from megatron_disagmoe.schedules.dataflow import (
    COMPUTE,
    TRANSFER,
    Channel,
    Port,
    channel_of,
    inputs,
    outputs,
    redispatched,
    transfer,
)

#: Nominal times that decide how early a receive is posted; safety does not depend on them, only buffer counts do.
_NOMINAL_TIME = {Kind.F: 1.0, Kind.B: 2.0, Kind.I: 1.0, Kind.W: 1.0, Kind.D: 0.0}
_NOMINAL_TRANSFER = 0.5

_Item = tuple[int, int]
"""One transfer: (number of its port in the wiring, micro-batch)."""


class _Wiring:
    """Ports of a schedule as small integers, and what every stage needs from and makes for other groups."""

    def __init__(self, schedule: Schedule) -> None:
        self.placement = schedule.placement
        self.again = redispatched(schedule)
        self.ports: list[Port] = []
        self.channels: list[Channel] = []
        self.channel_of_port: list[int] = []
        self._port_number: dict[Port, int] = {}
        self._channel_number: dict[Channel, int] = {}
        layers = schedule.placement.num_layers
        stages = {Side.A: layers + 1, Side.F: layers}
        self.needs: dict[tuple[Side, bool], dict[Kind, dict[int, tuple[int, ...]]]] = {
            (side, again): {
                kind: {
                    layer: self._numbers(inputs(side, kind, layer, num_layers=layers, again=again))
                    for layer in range(stages[side])
                }
                for kind in COMPUTE
            }
            for side in Side
            for again in (False, True)
        }
        self.makes: dict[Side, dict[Kind, dict[int, tuple[int, ...]]]] = {
            side: {
                kind: {
                    layer: self._numbers(outputs(side, kind, layer, num_layers=layers)) for layer in range(stages[side])
                }
                for kind in COMPUTE
            }
            for side in Side
        }

    def _numbers(self, ports: Iterable[Port]) -> tuple[int, ...]:
        return tuple(self._number(port) for port in ports if not self.placement.is_local(port.edge, port.layer))

    def _number(self, port: Port) -> int:
        if port not in self._port_number:
            self._port_number[port] = len(self.ports)
            self.ports.append(port)
            channel = channel_of(self.placement, port)
            if channel not in self._channel_number:
                self._channel_number[channel] = len(self.channels)
                self.channels.append(channel)
            self.channel_of_port.append(self._channel_number[channel])
        return self._port_number[port]

    def number_of(self, action: Action) -> int | None:
        """Number of the port that a SEND or RECV names; None where no stage needs it."""
        assert action.edge is not None, "only transfers name an edge"
        return self._port_number.get(Port(action.edge, action.gradient, action.layer))

    def inputs_of(self, side: Side, action: Action) -> tuple[int, ...]:
        """Ports that a compute action waits for."""
        again = side is Side.F and (action.layer, action.micro_batch) in self.again
        return self.needs[side, again][action.kind].get(action.layer, ())

    def outputs_of(self, side: Side, action: Action) -> tuple[int, ...]:
        """Ports that a compute action fills."""
        return self.makes[side][action.kind].get(action.layer, ())


def compute_only(schedule: Schedule) -> Schedule:
    """``schedule`` without its sends and receives."""
    return dataclasses.replace(
        schedule,
        actions={
            group: tuple(action for action in actions if action.kind not in TRANSFER)
            for group, actions in schedule.actions.items()
        },
    )


def lowered(schedule: Schedule) -> Schedule:
    """``schedule`` as it runs: with its transfers derived where it has none at all, else as it is."""
    if any(action.kind in TRANSFER for actions in schedule.actions.values() for action in actions):
        return schedule
    return post_receives(add_communication(schedule))


def add_communication(schedule: Schedule) -> Schedule:
    """Derive every transfer: SEND right after the compute that makes it, RECV just before the one that needs it.

    On each channel receives are posted in the order of the sends. Where a consumer needs a later message first, the
    earlier ones are therefore received ahead of their own consumers. Transfers already in ``schedule`` are replaced.
    """
    schedule = compute_only(schedule)
    wiring = _Wiring(schedule)
    sent: list[list[_Item]] = [[] for _ in wiring.channels]
    place: dict[_Item, int] = {}
    for group, actions in schedule.actions.items():
        for action in actions:
            for port in wiring.outputs_of(group.side, action):
                order = sent[wiring.channel_of_port[port]]
                place[port, action.micro_batch] = len(order)
                order.append((port, action.micro_batch))
    received = [0] * len(wiring.channels)
    return dataclasses.replace(
        schedule,
        actions={
            group: tuple(_with_transfers(group, actions, wiring, sent, place, received))
            for group, actions in schedule.actions.items()
        },
    )


def _with_transfers(
    group: Group,
    actions: tuple[Action, ...],
    wiring: _Wiring,
    sent: list[list[_Item]],
    place: dict[_Item, int],
    received: list[int],
) -> list[Action]:
    """One group's list with its transfers; ``received`` counts, per channel, the receives emitted so far."""
    result: list[Action] = []
    for action in actions:
        micro_batch = action.micro_batch
        for port in wiring.inputs_of(group.side, action):
            position = place.get((port, micro_batch))
            if position is None:  # nobody makes it; keep the receive so that the verifier can name it
                result.append(transfer(Kind.RECV, wiring.ports[port], micro_batch))
                continue
            channel = wiring.channel_of_port[port]
            for other, other_micro_batch in sent[channel][received[channel] : position + 1]:
                result.append(transfer(Kind.RECV, wiring.ports[other], other_micro_batch))
            received[channel] = max(received[channel], position + 1)
        result.append(action)
        for port in wiring.outputs_of(group.side, action):
            result.append(transfer(Kind.SEND, wiring.ports[port], micro_batch))
    return result


def post_receives(schedule: Schedule, *, ahead: int = 2) -> Schedule:
    """Move every RECV to before the ``ahead`` compute actions in front of the one that needs it, or earlier.

    A RECV goes earlier still where its message is made earlier in a nominal run (forward 1, backward 2, transfer 0.5):
    it then stands before the first compute action that ends after the producer did. This is what makes the result
    free of rendezvous deadlock: run in order of nominal end times, every SEND finds its RECV posted. Order on each
    channel is kept.

    Args:
        schedule: with the transfers of ``add_communication``.
        ahead: compute actions between a receive and its consumer, at least; 0 leaves only what rendezvous asks for.

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


def _nominal_run(schedule: Schedule, wiring: _Wiring) -> tuple[dict[Group, list[_End]], dict[_Item, _End]]:
    """Run the compute actions with sends that never block; actions that can never start are left out."""
    computes = {
        group: [action for action in actions if action.kind in COMPUTE] for group, actions in schedule.actions.items()
    }
    ends: dict[Group, list[_End]] = {group: [] for group in computes}
    produced: dict[_Item, _End] = {}
    waiting: dict[_Item, Group] = {}
    ready = list(reversed(computes))
    taken = 0
    while ready:
        group = ready.pop()
        side, mine, done = group.side, computes[group], ends[group]
        now = done[-1][0] if done else 0.0
        for action in mine[len(done) :]:
            micro_batch = action.micro_batch
            missing = False
            for port in wiring.inputs_of(side, action):
                made = produced.get((port, micro_batch))
                if made is None:
                    waiting[port, micro_batch] = group
                    missing = True
                    break
                now = max(now, made[0] + _NOMINAL_TRANSFER)
            if missing:
                break
            now += _NOMINAL_TIME[action.kind]
            taken += 1
            done.append((now, taken))
            for port in wiring.outputs_of(side, action):
                produced.setdefault((port, micro_batch), (now, taken))
                woken = waiting.pop((port, micro_batch), None)
                if woken is not None:
                    ready.append(woken)
    return ends, produced


def _reposted(
    actions: tuple[Action, ...], wiring: _Wiring, ends: list[_End], produced: dict[_Item, _End], ahead: int
) -> tuple[Action, ...]:
    """One group's list with its receives moved."""
    slots: list[list[Action]] = [[]]  # slots[k]: what stands between compute k-1 and compute k, sends only
    computes: list[Action] = []
    receives: list[tuple[Action, int]] = []  # with the slot it goes to
    for action in actions:
        if action.kind is Kind.RECV:
            slot = max(0, len(computes) - ahead)
            number = wiring.number_of(action)
            made = produced.get((number, action.micro_batch)) if number is not None else None
            if made is not None:
                slot = min(slot, bisect_right(ends, made))
            receives.append((action, slot))
        elif action.kind is Kind.SEND:
            slots[-1].append(action)
        else:
            computes.append(action)
            slots.append([])
    posted: list[list[Action]] = [[] for _ in slots]
    earliest: dict[int | None, int] = {}
    for action, slot in reversed(receives):  # from the back: nothing may overtake on its channel
        number = wiring.number_of(action)
        channel = None if number is None else wiring.channel_of_port[number]
        earliest[channel] = slot = min(slot, earliest.get(channel, slot))
        posted[slot].append(action)
    result: list[Action] = []
    for index, sends in enumerate(slots):
        result.extend(sends)
        result.extend(reversed(posted[index]))
        if index < len(computes):
            result.append(computes[index])
    return tuple(result)
