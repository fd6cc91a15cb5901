"""The simulator again, slow and plain: no numba, no arrays, no tables of its own but ``schedules.dataflow``."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

from megatron_disagmoe.schedules.actions import Action, Edge, Group, Kind, Schedule, Side
from megatron_disagmoe.schedules.dataflow import COMPUTE, Port, channel_of, inputs, outputs, redispatched
from megatron_disagmoe.simulator.costs import StageCosts

Name = tuple[object, ...]


@dataclass
class Task:
    """``priority`` and ``index`` say who goes first among those who wait; ``needs`` are the names of other tasks."""

    duration: Fraction
    resources: tuple[object, ...]
    priority: int
    index: tuple[int, ...]
    needs: set[Name]
    ready: Fraction | None = None
    start: Fraction | None = None

    def ended(self, now: Fraction) -> bool:
        """Whether it is over at ``now``."""
        return self.start is not None and self.start + self.duration <= now


def run(tasks: dict[Name, Task]) -> bool:
    """Set every task's start; False where some never start.

    Of those who could start the one with the least (priority, moment it became ready, index) does, then the next.
    """
    now = Fraction(0)
    while True:
        ended = {name for name, task in tasks.items() if task.ended(now)}
        busy = {r for task in tasks.values() if task.start is not None and not task.ended(now) for r in task.resources}
        waiting: list[tuple[int, Fraction, tuple[int, ...], Task]] = []
        for task in tasks.values():
            if task.start is None and task.needs <= ended:
                task.ready = now if task.ready is None else task.ready
                waiting.append((task.priority, task.ready, task.index, task))
        at_once = False
        for *_, task in sorted(waiting, key=lambda entry: entry[:3]):
            if busy.isdisjoint(task.resources):
                task.start = now
                busy.update(task.resources)
                at_once |= task.duration == 0
        if at_once:  # they held their resources, and are over at the same moment
            continue
        ends = [task.start + task.duration for task in tasks.values() if task.start is not None]
        if all(end <= now for end in ends):
            return len(ends) == len(tasks)
        now = min(end for end in ends if end > now)


def exact(value: float) -> Fraction:
    """The decimal number that ``value`` stands for."""
    return Fraction(str(value))


def schedule_tasks(schedule: Schedule, costs: StageCosts) -> dict[Name, Task]:
    """Compute actions by ``(group, action)``, transfers by ``(port, micro_batch)``."""
    placement, again = schedule.placement, redispatched(schedule)
    layers = placement.num_layers
    tasks: dict[Name, Task] = {}
    position = 0
    for group in placement.groups:
        before: Name | None = None
        for action in (action for action in schedule.actions.get(group, ()) if action.kind in COMPUTE):
            needs: set[Name] = set() if before is None else {before}
            for port in inputs(
                group.side,
                action.kind,
                action.layer,
                num_layers=layers,
                again=(action.layer, action.micro_batch) in again,
            ):
                if _is_transfer(schedule, port, costs):
                    needs.add((port, action.micro_batch))
            before = (group, action)
            is_again = (action.layer, action.micro_batch) in again and group.side is Side.F
            tasks[before] = Task(_duration(group, action, costs, layers, is_again), (), 0, (0, position), needs)
            for port in outputs(group.side, action.kind, action.layer, num_layers=layers):
                if _is_transfer(schedule, port, costs):
                    channel = channel_of(placement, port)
                    tasks[port, action.micro_batch] = Task(
                        _transfer_time(port, costs),
                        (("out", channel.sender), ("in", channel.receiver)),
                        0,
                        (1, _turn(port), position),
                        {before},
                    )
            position += 1
    _send_late(schedule, tasks)
    if schedule.ports_in_order:
        _in_order(schedule, tasks)
    return tasks


def _in_order(schedule: Schedule, tasks: dict[Name, Task]) -> None:
    """A port serves each message after the one before it in the list."""
    for actions in schedule.actions.values():
        for kind in (Kind.SEND, Kind.RECV):
            before: Name | None = None
            for action in actions:
                if action.kind is kind and action.edge not in (None, Edge.LANE):
                    assert action.edge is not None, "a transfer names its edge"
                    name: Name = (Port(action.edge, action.gradient, action.layer), action.micro_batch)
                    if before is not None:
                        tasks[name].needs.add(before)
                    before = name


def _send_late(schedule: Schedule, tasks: dict[Name, Task]) -> None:
    """What is not sent right behind its maker waits for the compute action before its SEND; equals in list order."""
    turn = 0
    for group in schedule.placement.groups:
        before: Name = ()
        made: set[Name] = set()  # by ``before``; empty once something late was sent, which what follows is sent after
        for action in schedule.actions.get(group, ()):
            if action.kind in COMPUTE:
                ports = outputs(group.side, action.kind, action.layer, num_layers=schedule.placement.num_layers)
                before, made = (group, action), {(port, action.micro_batch) for port in ports}
            elif action.kind is Kind.SEND:
                assert action.edge is not None, "a transfer names its edge"
                name: Name = (Port(action.edge, action.gradient, action.layer), action.micro_batch)
                if name in made:
                    continue
                made = set()
                turn += 1
                if name in tasks:
                    tasks[name].needs, tasks[name].index = {before}, (2, turn)


def _is_transfer(schedule: Schedule, port: Port, costs: StageCosts) -> bool:
    if schedule.placement.is_local(port.edge, port.layer):
        return False
    return port.edge is not Edge.LANE or costs.lane > 0


def _turn(port: Port) -> int:
    """Of transfers that are ready at one moment: forward, gradients, what is sent again, lanes forward, back."""
    if port.edge is Edge.LANE:
        return 3 + port.gradient
    return 2 if port.edge is Edge.AGAIN else int(port.gradient)


def _duration(group: Group, action: Action, costs: StageCosts, layers: int, is_again: bool) -> Fraction:
    is_ffn = group.side is Side.F
    forward = exact(costs.ffn if is_ffn else costs.tail if action.layer == layers else costs.attention)
    if not is_ffn and action.layer == 0:
        forward += exact(costs.embedding)
    again = exact(costs.recompute_ffn if is_ffn else 0 if action.layer == layers else costs.recompute_attention)
    if is_again:
        again = Fraction(1)
    weights = exact(costs.backward_ratio) * exact(costs.weight_fraction)
    for_inputs = again + exact(costs.backward_ratio) - weights
    shares = {
        Kind.F: Fraction(1),
        Kind.I: for_inputs,
        Kind.W: weights,
        Kind.B: for_inputs + weights,
        Kind.D: Fraction(0),
    }
    return forward * shares[action.kind]


def _transfer_time(port: Port, costs: StageCosts) -> Fraction:
    if port.edge is Edge.LANE:
        return exact(costs.lane)
    combine = costs.transfer if costs.combine is None else costs.combine
    return exact(combine if port.edge is Edge.N2M else costs.transfer)
