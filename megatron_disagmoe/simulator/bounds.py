"""How long a step takes at least, whatever its order: proven lower bounds on the makespan.

A *resource* is a group's compute, its sending or its receiving port; it does one thing at a time.

``busy``   The most work on one resource.
``fill``   The largest, over the resources, of the earliest moment it can get its first work, all its work, and the
           least time from its last work to the end of the step. Both times are longest paths of a single micro-batch.
``phase``  ``fill``, made stronger by what a resource cannot do yet and cannot do any more. Before the first backward
           can reach it there is only forward work, and after its last forward only backward work; in either phase its
           neighbour (a port before or after compute) may hand over too little to keep it busy.

``phase`` in detail, for a resource with ``work`` in all. Nothing but forward work exists before ``b``, the earliest
moment of its first backward work, so at most ``w1`` of it is done by then. Nothing but backward work exists in the last
``f``, the least time from its last forward work to the end, so at most ``w3`` is done there. The rest, if there is any,
lies between: makespan >= b + (work - w1 - w3) + f. With w1 = b - (first work) and w3 = f - (time after the last work)
that is ``fill``. They are less than that where

- compute runs forwards before ``b``: each one's inputs passed its receiving port before, one after the other;
- a sending port sends forward before ``b``: each message was computed by its group before, one after the other;
- compute runs backwards in the last ``f``: each one's gradients pass its sending port afterwards;
- a receiving port takes gradients in the last ``f``: each one's backward is computed by its group afterwards.

Each is a knapsack (most work done, for the neighbour's time), relaxed to fractions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from megatron_disagmoe.schedules.actions import Placement, Schedule
from megatron_disagmoe.schedules.orders import D, I, Orders, group_of_stage
from megatron_disagmoe.simulator.costs import StageCosts

#: Differences below this share are taken for rounding errors.
_ROUNDING = 1e-9


@dataclass(frozen=True)
class Workload:
    """What is to be done, in no order.

    ``split``: for every stage (A(i) is 2i, F(i) is 2i + 1) how many micro-batches have their backward as I and W.
    ``again``: for every layer how many micro-batches are dispatched a second time.
    """

    placement: Placement
    costs: StageCosts
    num_micro_batches: int
    forward_only: bool
    split: tuple[int, ...]
    again: tuple[int, ...]

    @classmethod
    def uniform(
        cls,
        placement: Placement,
        costs: StageCosts,
        *,
        num_micro_batches: int,
        forward_only: bool = False,
        split_backward: bool = False,
        redispatch: bool = False,
    ) -> Workload:
        """All micro-batches alike."""
        layers = placement.num_layers
        return cls(
            placement=placement,
            costs=costs,
            num_micro_batches=num_micro_batches,
            forward_only=forward_only,
            split=(num_micro_batches * (split_backward and not forward_only),) * (2 * layers + 1),
            again=(num_micro_batches * (redispatch and not forward_only),) * layers,
        )

    @classmethod
    def of(cls, schedule: Schedule | Orders, costs: StageCosts) -> Workload:
        """What ``schedule`` does."""
        orders = Orders.of(schedule) if isinstance(schedule, Schedule) else schedule
        last = 2 * orders.placement.num_layers
        split = np.bincount(orders.stage[orders.kind == I], minlength=last + 1)
        again = np.bincount(orders.stage[orders.kind == D] >> 1, minlength=last // 2)
        return cls(
            placement=orders.placement,
            costs=costs,
            num_micro_batches=orders.num_micro_batches,
            forward_only=orders.forward_only,
            split=tuple(split.tolist()),
            again=tuple(again.tolist()),
        )


@dataclass(frozen=True)
class Bounds:
    """Lower bounds on the makespan, in the unit of the costs; see the module's docstring."""

    busy: float
    fill: float
    phase: float


def lower_bounds(workload: Workload) -> Bounds:
    """Every bound on ``workload``."""
    stations = _stations(workload)
    resources = [resource for station in stations for resource in station.resources if resource.items]
    return Bounds(
        busy=max(resource.work for resource in resources),
        fill=max(resource.fill for resource in resources),
        phase=max(Paths(workload).whole, *(station.phase() for station in stations)),
    )


def busy_bound(schedule: Schedule | Orders, costs: StageCosts) -> float:
    """``lower_bounds(...).busy`` of what ``schedule`` does."""
    return lower_bounds(Workload.of(schedule, costs)).busy


def fill_bound(schedule: Schedule | Orders, costs: StageCosts) -> float:
    """``lower_bounds(...).fill`` of what ``schedule`` does."""
    return lower_bounds(Workload.of(schedule, costs)).fill


class Paths:
    """Longest paths of one micro-batch alone in the machine, to and from the actions of every stage.

    ``forward``, ``backward``: time of F, and of B or I. ``weights``: time of W, 0 where B contains it.
    ``forward_start``, ``backward_start``: earliest start. ``after_forward``, ``after_backward``: least time from an
    action's end to the end of the step. Where only some micro-batches have their backward split, the shorter holds.
    """

    def __init__(self, workload: Workload) -> None:
        costs, layers = workload.costs, workload.placement.num_layers
        self.workload = workload
        self.groups = group_of_stage(workload.placement).tolist()
        self.last = last = 2 * layers
        stages = range(last + 1)
        self.forward = [costs.forward(stage, num_layers=layers) for stage in stages]
        self.inputs = [costs.input_gradient(stage, num_layers=layers) for stage in stages]
        self.weights = [costs.weight_gradient(stage, num_layers=layers) for stage in stages]
        self.backward = [
            i if split else i + w for i, w, split in zip(self.inputs, self.weights, workload.split, strict=True)
        ]
        self.edge = [costs.edge(edge) for edge in range(last)]
        self.lane = [  # by the stage it leaves in forward; 0 where it is no transfer
            costs.lane if stage % 2 == 0 and stage < last and self.groups[stage] != self.groups[stage + 2] else 0.0
            for stage in stages
        ]
        self._forward_start()
        self._after()

    def _forward_start(self) -> None:
        last = self.last
        self.forward_start = [0.0] * (last + 1)
        self.backward_start = [0.0] * (last + 1)
        for stage in range(1, last + 1):
            start = self.forward_start[stage - 1] + self.forward[stage - 1] + self.edge[stage - 1]
            if stage % 2 == 0:
                start = max(start, self.forward_start[stage - 2] + self.forward[stage - 2] + self.lane[stage - 2])
            self.forward_start[stage] = start
        self.backward_start[last] = self.forward_start[last] + self.forward[last]
        for stage in range(last - 1, -1, -1):
            start = self.backward_start[stage + 1] + self.backward[stage + 1] + self.edge[stage]
            if stage % 2 == 0:
                start = max(start, self.backward_start[stage + 2] + self.backward[stage + 2] + self.lane[stage])
            self.backward_start[stage] = start

    def _after(self) -> None:
        last, workload = self.last, self.workload
        self.after_forward = [0.0] * (last + 1)
        self.after_backward = [0.0] * (last + 1)
        for stage in range(last + 1):
            # W follows where every micro-batch has one
            after = self.weights[stage] if workload.split[stage] == workload.num_micro_batches else 0.0
            if stage > 0:
                after = max(after, self.edge[stage - 1] + self.backward[stage - 1] + self.after_backward[stage - 1])
            if stage > 0 and stage % 2 == 0:
                lane = self.lane[stage - 2] + self.backward[stage - 2] + self.after_backward[stage - 2]
                after = max(after, lane)
            self.after_backward[stage] = after
        if not workload.forward_only:
            self.after_forward[last] = self.backward[last] + self.after_backward[last]
        for stage in range(last - 1, -1, -1):
            after = self.edge[stage] + self.forward[stage + 1] + self.after_forward[stage + 1]
            if stage % 2 == 0:
                after = max(after, self.lane[stage] + self.forward[stage + 2] + self.after_forward[stage + 2])
            self.after_forward[stage] = after

    def next_stages(self, stage: int) -> Iterator[tuple[int, float]]:
        """Where ``stage`` sends to in forward, and gets gradients from, with the time of the transfer."""
        if stage < self.last:
            yield stage + 1, self.edge[stage]
            if self.lane[stage] > 0:
                yield stage + 2, self.lane[stage]

    def sent(self, stage: int) -> float:
        """Time on the sending port for what ``stage`` sends forward; its gradients take as long to come."""
        return sum(time for _, time in self.next_stages(stage))

    def received(self, stage: int) -> float:
        """Time on the receiving port for what ``stage`` needs in forward; its gradients take as long to go."""
        return (self.edge[stage - 1] if stage else 0.0) + (self.lane[stage - 2] if stage >= 2 else 0.0)

    @property
    def whole(self) -> float:
        """A step of one micro-batch."""
        return self.forward[0] + self.after_forward[0]


class _Item(NamedTuple):
    """Work of one kind on one resource: ``number`` times ``time``."""

    time: float
    number: int
    earliest: float
    after: float
    is_forward: bool


class _Load(NamedTuple):
    """Up to ``number`` times ``work`` on a resource, each of which costs a neighbour ``price``."""

    work: float
    price: float
    number: int


@dataclass
class _Resource:
    """What one resource has to do.

    ``first``: its forward work by what that costs the neighbour that feeds it, ``final``: its backward work by what it
    costs the neighbour that it feeds; empty where no neighbour counts.
    """

    items: list[_Item] = field(default_factory=list)
    first: list[_Load] = field(default_factory=list)
    final: list[_Load] = field(default_factory=list)

    def add(self, time: float, number: int, earliest: float, after: float, *, is_forward: bool) -> None:
        """Note work, if there is any."""
        if time > 0 and number > 0:
            self.items.append(_Item(time, number, earliest, after, is_forward))

    @property
    def work(self) -> float:
        return sum(item.time * item.number for item in self.items)

    @property
    def earliest(self) -> float:
        return min((item.earliest for item in self.items), default=0.0)

    @property
    def after(self) -> float:
        return min((item.after for item in self.items), default=0.0)

    @property
    def fill(self) -> float:
        return self.earliest + self.work + self.after


@dataclass
class _Station:
    """A group's compute and its two ports."""

    compute: _Resource = field(default_factory=_Resource)
    sending: _Resource = field(default_factory=_Resource)
    receiving: _Resource = field(default_factory=_Resource)

    @property
    def resources(self) -> tuple[_Resource, ...]:
        return self.compute, self.sending, self.receiving

    def phase(self) -> float:
        """The largest phase bound of the three."""
        gradients_sent = [item.after for item in self.sending.items if not item.is_forward]
        return max(
            _phase(
                self.compute,
                first_start=self.receiving.earliest,
                final_after=min(gradients_sent, default=0.0),
            ),
            _phase(self.sending, first_start=self.compute.earliest),
            _phase(self.receiving, final_after=self.compute.after),
        )


def _phase(resource: _Resource, *, first_start: float = 0.0, final_after: float = 0.0) -> float:
    """The phase bound; ``first_start`` and ``final_after`` say when the neighbours can begin and must be done."""
    forward = [item for item in resource.items if item.is_forward]
    backward = [item for item in resource.items if not item.is_forward]
    if not (forward and backward):
        return resource.fill
    before = min(item.earliest for item in backward)
    after = min(item.after for item in forward)
    head, tail = before - resource.earliest, after - resource.after
    if resource.first:
        head = min(head, _most(resource.first, before - first_start))
    if resource.final:
        tail = min(tail, _most(resource.final, after - final_after))
    rest = resource.work - max(head, 0.0) - max(tail, 0.0)
    # where all work fits into both phases they may overlap; a rounding error is no rest
    return max(resource.fill, before + rest + after) if rest > _ROUNDING * resource.work else resource.fill


def _most(loads: Sequence[_Load], budget: float) -> float:
    """The most work that ``budget`` buys, the last piece in part."""
    done = 0.0
    for load in sorted(loads, key=lambda load: load.price / load.work):
        count = float(load.number)
        if load.price > 0:
            count = min(count, max(budget, 0.0) / load.price)
        done += load.work * count
        budget -= load.price * count
    return done


def _stations(workload: Workload) -> list[_Station]:
    """Every group with everything it has to do."""
    paths = Paths(workload)
    stations = [_Station() for _ in workload.placement.groups]
    for stage, group in enumerate(paths.groups):
        _add_compute(workload, paths, stage, stations[group].compute)
        _add_forward_messages(workload, paths, stage, stations)
        if not workload.forward_only:
            _add_gradients(workload, paths, stage, stations)
    return stations


def _add_compute(workload: Workload, paths: Paths, stage: int, compute: _Resource) -> None:
    n, split = workload.num_micro_batches, workload.split[stage]
    compute.add(paths.forward[stage], n, paths.forward_start[stage], paths.after_forward[stage], is_forward=True)
    arrives = paths.received(stage)
    if paths.forward[stage] > 0:
        compute.first.append(_Load(paths.forward[stage], arrives, n))
    if workload.forward_only or paths.forward[stage] == 0:
        return
    inputs, weights, start = paths.inputs[stage], paths.weights[stage], paths.backward_start[stage]
    compute.add(inputs + weights, n - split, start, paths.after_backward[stage], is_forward=False)
    compute.add(inputs, split, start, paths.after_backward[stage], is_forward=False)
    compute.add(weights, split, start + inputs, 0.0, is_forward=False)
    for work, price, number in (
        (inputs + weights, arrives, n - split),
        (inputs, arrives, split),
        (weights, 0.0, split),
    ):
        if work > 0 and number > 0:
            compute.final.append(_Load(work, price, number))


def _add_forward_messages(workload: Workload, paths: Paths, stage: int, stations: Sequence[_Station]) -> None:
    """What ``stage`` sends forward: to the next stage (twice where it is dispatched again), and along the lane."""
    n, sender = workload.num_micro_batches, stations[paths.groups[stage]].sending
    made = paths.forward_start[stage] + paths.forward[stage]
    for to, time in paths.next_stages(stage):
        receiver = stations[paths.groups[to]].receiving
        after = paths.forward[to] + paths.after_forward[to]
        for port in (sender, receiver):
            port.add(time, n, made, after, is_forward=True)
    sent = paths.sent(stage)
    if sent > 0:
        sender.first.append(_Load(sent, paths.forward[stage], n))
    again = workload.again[stage // 2] if stage % 2 == 0 and stage < paths.last else 0
    if again and paths.edge[stage] > 0:
        receiver = stations[paths.groups[stage + 1]].receiving
        after = paths.backward[stage + 1] + paths.after_backward[stage + 1]
        # it leaves in the first phase if it likes, and arrives for a backward
        sender.add(paths.edge[stage], again, made, after, is_forward=True)
        receiver.add(paths.edge[stage], again, made, after, is_forward=False)
        sender.first.append(_Load(paths.edge[stage], 0.0, again))
        receiver.final.append(_Load(paths.edge[stage], 0.0, again))


def _add_gradients(workload: Workload, paths: Paths, stage: int, stations: Sequence[_Station]) -> None:
    """The gradients that ``stage`` gets."""
    n, receiver = workload.num_micro_batches, stations[paths.groups[stage]].receiving
    for source, time in paths.next_stages(stage):
        sender = stations[paths.groups[source]].sending
        made = paths.backward_start[source] + paths.backward[source]
        after = paths.backward[stage] + paths.after_backward[stage]
        for port in (sender, receiver):
            port.add(time, n, made, after, is_forward=False)
    if paths.sent(stage) > 0:
        receiver.final.append(_Load(paths.sent(stage), paths.inputs[stage] + paths.weights[stage], n))
