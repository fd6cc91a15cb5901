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

``cap``    With at most ``max_live`` activations alive on a group: the largest of ``phase``, of what follows from how
long an activation must live (``live_bound``), and of ``phase`` with two more limits. Before ``b`` nothing is freed (or
only stages whose backward takes no time: they are left out), so a group computes at most ``max_live`` forwards and
sends what they made. What it computes in the last ``f`` frees activations that were alive when they began, at most
``max_live``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from megatron_disagmoe.schedules.actions import Schedule
from megatron_disagmoe.schedules.orders import Orders
from megatron_disagmoe.simulator.costs import StageCosts
from megatron_disagmoe.simulator.live_bound import live_bound
from megatron_disagmoe.simulator.workload import Paths, Workload

__all__ = ["Bounds", "Paths", "Workload", "busy_bound", "fill_bound", "lower_bounds"]

#: Differences below this share are taken for rounding errors.
_ROUNDING = 1e-9


@dataclass(frozen=True)
class Bounds:
    """Lower bounds on the makespan, in the unit of the costs; see the module's docstring."""

    busy: float
    fill: float
    phase: float
    cap: float


def lower_bounds(workload: Workload, *, max_live: int | None = None) -> Bounds:
    """Every bound on ``workload``.

    Args:
        max_live: cap on the activations alive on a group; without one ``cap`` is ``phase``.

    Raises:
        ValueError: where no order keeps within ``max_live``.
    """
    paths, stations = Paths(workload), _stations(workload)
    resources = [resource for station in stations for resource in station.resources if resource.items]
    phase = max(paths.whole, *(station.phase() for station in stations))
    capped = phase
    if max_live is not None and not workload.forward_only:
        capped = max(phase, live_bound(paths, max_live), *(station.phase(max_live) for station in stations))
    return Bounds(
        busy=max(resource.work for resource in resources),
        fill=max(resource.fill for resource in resources),
        phase=phase,
        cap=capped,
    )


def busy_bound(schedule: Schedule | Orders, costs: StageCosts) -> float:
    """``lower_bounds(...).busy`` of what ``schedule`` does."""
    return lower_bounds(Workload.of(schedule, costs)).busy


def fill_bound(schedule: Schedule | Orders, costs: StageCosts) -> float:
    """``lower_bounds(...).fill`` of what ``schedule`` does."""
    return lower_bounds(Workload.of(schedule, costs)).fill


class _Item(NamedTuple):
    """Work of one kind on one resource: ``number`` times ``time``."""

    time: float
    number: int
    earliest: float
    after: float
    is_forward: bool


class _Load(NamedTuple):
    """Up to ``number`` times ``work`` on a resource, each of which costs ``price`` of something that is limited."""

    work: float
    price: float
    number: int


class _Kept(NamedTuple):
    """``number`` times ``work``, each on an activation that lives ``until`` then at least."""

    work: float
    number: int
    until: float


@dataclass
class _Resource:
    """What one resource has to do.

    ``first``: its forward work by what that costs the neighbour that feeds it, ``final``: its backward work by what it
    costs the neighbour that it feeds; ``first_live`` and ``final_live``: the same work by the activations it needs.
    Empty where there is no such limit.
    """

    items: list[_Item] = field(default_factory=list)
    first: list[_Load] = field(default_factory=list)
    final: list[_Load] = field(default_factory=list)
    first_live: list[_Kept] = field(default_factory=list)
    final_live: list[_Kept] = field(default_factory=list)

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

    def phase(self, max_live: int | None = None) -> float:
        """The largest phase bound of the three."""
        gradients_sent = [item.after for item in self.sending.items if not item.is_forward]
        return max(
            _phase(
                self.compute,
                first_start=self.receiving.earliest,
                final_after=min(gradients_sent, default=0.0),
                max_live=max_live,
            ),
            _phase(self.sending, first_start=self.compute.earliest, max_live=max_live),
            # what it receives at the end may be for forwards that are still to run, so no cap holds there
            _phase(self.receiving, final_after=self.compute.after),
        )


def _phase(
    resource: _Resource, *, first_start: float = 0.0, final_after: float = 0.0, max_live: int | None = None
) -> float:
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
    if max_live is not None and resource.first_live:
        head = min(head, _most_alive(resource.first_live, before, max_live))
    if max_live is not None and resource.final_live:
        tail = min(tail, _most_alive(resource.final_live, 0.0, max_live))
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


def _most_alive(kept: Sequence[_Kept], moment: float, max_live: int) -> float:
    """The most work on activations of which ``max_live`` may be alive at ``moment``."""
    return _most([_Load(work, float(until >= moment), number) for work, number, until in kept], max_live)


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


def _loads(work: float, price: float, number: int) -> list[_Load]:
    return [_Load(work, price, number)] if work > 0 and number > 0 else []


def _kept(workload: Workload, paths: Paths, stage: int, work: float) -> list[_Kept]:
    """``work`` for every micro-batch of a stage; what is dispatched again keeps no activation alive."""
    n, dropped = workload.num_micro_batches, workload.dropped(stage)
    until = paths.backward_start[stage] + paths.backward[stage]
    parts = ((n - dropped, until), (dropped, -math.inf))
    return [_Kept(work, number, until) for number, until in parts if work > 0 and number > 0]


def _add_compute(workload: Workload, paths: Paths, stage: int, compute: _Resource) -> None:
    n, split = workload.num_micro_batches, workload.split[stage]
    forward, arrives = paths.forward[stage], paths.received(stage)
    compute.add(forward, n, paths.forward_start[stage], paths.after_forward[stage], is_forward=True)
    compute.first += _loads(forward, arrives, n)
    compute.first_live += _kept(workload, paths, stage, forward)
    if workload.forward_only:
        return
    inputs, weights, start = paths.inputs[stage], paths.weights[stage], paths.backward_start[stage]
    compute.add(inputs + weights, n - split, start, paths.after_backward[stage], is_forward=False)
    compute.add(inputs, split, start, paths.after_backward[stage], is_forward=False)
    compute.add(weights, split, start + inputs, 0.0, is_forward=False)
    again, dropped = paths.again[stage], workload.dropped(stage)
    compute.add(again, dropped, start, paths.after_backward[stage], is_forward=False)
    compute.final += _loads(again, 0.0, dropped)
    # the gradients leave after B, or after I; W is free
    compute.final += _loads(inputs + weights, arrives, n - split)
    compute.final += _loads(inputs, arrives, split) + _loads(weights, 0.0, split)
    compute.final_live += _kept(workload, paths, stage, inputs + weights)
    if again > 0:
        compute.final_live.append(_Kept(again, dropped, -math.inf))


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
    sender.first += _loads(sent, paths.forward[stage], n)
    sender.first_live += _kept(workload, paths, stage, sent)
    again = workload.again[stage // 2] if stage % 2 == 0 and stage < paths.last else 0
    if again and paths.edge[stage] > 0:
        receiver = stations[paths.groups[stage + 1]].receiving
        after = paths.backward[stage + 1] + paths.after_backward[stage + 1]
        # it leaves in the first phase if it likes, and arrives for a backward
        sender.add(paths.edge[stage], again, made, after, is_forward=True)
        receiver.add(paths.edge[stage], again, made, after, is_forward=False)
        sender.first += _loads(paths.edge[stage], 0.0, again)
        sender.first_live += _loads(paths.edge[stage], 0.0, again)
        receiver.final += _loads(paths.edge[stage], 0.0, again)


def _add_gradients(workload: Workload, paths: Paths, stage: int, stations: Sequence[_Station]) -> None:
    """The gradients that ``stage`` gets."""
    n, receiver = workload.num_micro_batches, stations[paths.groups[stage]].receiving
    for source, time in paths.next_stages(stage):
        sender = stations[paths.groups[source]].sending
        made = paths.backward_start[source] + paths.backward[source]
        after = paths.backward[stage] + paths.after_backward[stage]
        for port in (sender, receiver):
            port.add(time, n, made, after, is_forward=False)
    receiver.final += _loads(paths.sent(stage), paths.inputs[stage] + paths.weights[stage], n)
