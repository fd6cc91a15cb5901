"""Timetables: when every action of a micro-batch happens, so that no two of them need one resource at one moment.

A *circular* timetable repeats after a period, as software pipelines do: micro-batch after micro-batch leaves in the
same rhythm, and what one does at time t the next does a period later. A *plain* one is a circle too long to come round.

Times are integers (ticks). The resources of G groups: the compute of group g is g, its sending port G + g, its
receiving port 2G + g.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numba import njit

from megatron_disagmoe.schedules.orders import Ints
from megatron_disagmoe.simulator.engine import ticks_per_unit
from megatron_disagmoe.simulator.workload import Paths

#: Longer than any step: the period of a plain timetable.
NEVER = 1 << 60


@dataclass(frozen=True)
class Steps:
    """Everything one micro-batch does, in the order in which a timetable places it.

    ``first``, ``second``: the resources that a step takes, -1 for none. ``after``, ``also``: the steps it waits for, -1
    for none. ``compute``: the steps that compute: forward of every stage, then backward of the last stage and on down.
    ``group``: of every stage; ``keeps``: the same, -1 where nothing is kept from forward to backward, as it is
    dispatched again. ``scale``: ticks in one unit of time.
    """

    num_groups: int
    group: Ints
    keeps: Ints
    duration: Ints
    first: Ints
    second: Ints
    after: Ints
    also: Ints
    compute: Ints
    scale: float

    @cached_property
    def busiest(self) -> int:
        """The most steps on one resource."""
        return int(np.bincount(self._used[0]).max())

    @cached_property
    def work(self) -> int:
        """The most work on one resource."""
        used, step = self._used
        return int(np.bincount(used, self.duration[step]).max())

    @property
    def _used(self) -> tuple[Ints, Ints]:
        both = np.flatnonzero(self.second >= 0)
        step = np.concatenate((np.arange(len(self.first)), both))
        return np.concatenate((self.first, self.second[both])), step

    @property
    def needs(self) -> tuple[Ints, Ints, Ints, Ints, Ints]:
        """What ``place`` and ``circle`` want to know of the steps."""
        return self.duration, self.first, self.second, self.after, self.also

    @cached_property
    def alone(self) -> Ints:
        """Starts of all steps of a micro-batch that has the machine to itself."""
        times, _ = circle(np.zeros(1, np.int64), NEVER, self.num_groups, self.busiest, *self.needs)
        return times[0]


def steps_of(paths: Paths) -> Steps:
    """The steps of one micro-batch; backward whole.

    A second dispatch, where all micro-batches have it, leaves when the attention stage after it may begin its backward.
    """
    groups, last = paths.groups, paths.last
    number = max(groups) + 1
    dropped = [paths.workload.dropped(stage) == paths.workload.num_micro_batches for stage in range(last + 1)]
    rows: list[tuple[float, int, int, int, int]] = []
    compute: list[int] = []

    def leg(stages: range, times: list[float], begin: int) -> None:
        """Add computes and transfers along ``stages``; the first waits for step ``begin``."""
        way = stages.step
        arrival: dict[int, list[int]] = {stages[0]: [begin]}
        for stage in stages:
            if way < 0 and dropped[stage]:
                arrival[stage].append(len(rows))
                rows.append((paths.edge[stage - 1], number + groups[stage - 1], 2 * number + groups[stage], begin, -1))
            begin = arrival[stage][0]
            waits = [*arrival[stage], -1]
            compute.append(len(rows))
            rows.append((times[stage], groups[stage], -1, waits[0], waits[1]))
            for stride, time in ((1, paths.edge), (2, paths.lane)):
                to = stage + stride * way
                if not 0 <= to <= last:
                    continue
                length = time[min(stage, to)]
                if stride == 2 and length == 0:
                    continue
                arrival.setdefault(to, []).append(len(rows))
                rows.append((length, number + groups[stage], 2 * number + groups[to], compute[-1], -1))

    leg(range(last + 1), paths.forward, -1)
    both = [i + w for i, w in zip(paths.inputs, paths.weights, strict=True)]
    leg(range(last, -1, -1), both, compute[-1])
    duration, first, second, after, also = zip(*rows, strict=True)
    scale = ticks_per_unit(np.array(duration))
    return Steps(
        num_groups=number,
        group=np.array(groups, np.int64),
        keeps=np.where(dropped, -1, groups),
        duration=np.rint(np.array(duration) * scale).astype(np.int64),
        first=np.array(first, np.int64),
        second=np.array(second, np.int64),
        after=np.array(after, np.int64),
        also=np.array(also, np.int64),
        compute=np.array(compute, np.int64),
        scale=scale,
    )


@njit(cache=True)
def fit(begin: Ints, end: Ints, count: int, period: int, ready: int, time: int) -> int:
    """First moment from ``ready`` on at which a resource is free for ``time``; -1 where it never is.

    ``begin[:count]``, ``end[:count]``: when it is taken, in order, all between 0 and ``period``.
    """
    if time > period:
        return -1
    if count == 0 or time == 0:
        return ready
    at = ready % period
    lap = ready - at
    low, high = 0, count
    while low < high:  # the first interval that ends behind ``at``
        middle = (low + high) // 2
        if end[middle] > at:
            high = middle
        else:
            low = middle + 1
    t = ready
    while t - ready <= period:
        if low == count:
            low = 0
            lap += period
        if begin[low] + lap - t >= time:
            return t
        t = max(t, end[low] + lap)
        low += 1
    return -1


@njit(cache=True)
def _take(begin: Ints, end: Ints, count: int, period: int, t: int, time: int) -> int:
    """Note that a resource is taken from ``t`` for ``time``; the new number of intervals."""
    if time == 0:
        return count
    at = t % period
    rest = at + time - period
    if rest > 0:  # past the end of the circle
        count = _take_plain(begin, end, count, 0, rest)
        time -= rest
    return _take_plain(begin, end, count, at, at + time)


@njit(cache=True)
def _take_plain(begin: Ints, end: Ints, count: int, start: int, stop: int) -> int:
    at = count
    while at > 0 and begin[at - 1] > start:
        begin[at], end[at] = begin[at - 1], end[at - 1]
        at -= 1
    begin[at], end[at] = start, stop
    return count + 1


@njit(cache=True)
def _give_back(begin: Ints, end: Ints, count: int, period: int, t: int, time: int) -> int:
    """Undo ``_take``."""
    if time == 0:
        return count
    at = t % period
    rest = at + time - period
    if rest > 0:
        count = _give_back_plain(begin, end, count, 0)
    return _give_back_plain(begin, end, count, at)


@njit(cache=True)
def _give_back_plain(begin: Ints, end: Ints, count: int, start: int) -> int:
    at = np.searchsorted(begin[:count], start)
    for later in range(at + 1, count):
        begin[later - 1], end[later - 1] = begin[later], end[later]
    return count - 1


@njit(cache=True)
def give_back(
    begin: Ints,
    end: Ints,
    count: Ints,
    period: int,
    duration: Ints,
    first: Ints,
    second: Ints,
    times: Ints,
    steps: int,
) -> None:
    """Undo ``place`` for the first ``steps`` steps of a micro-batch."""
    for step in range(steps):
        for resource in (first[step], second[step]):
            if resource >= 0:
                count[resource] = _give_back(
                    begin[resource], end[resource], count[resource], period, times[step], duration[step]
                )


@njit(cache=True)
def take(
    begin: Ints, end: Ints, count: Ints, period: int, first: Ints, second: Ints, step: int, t: int, time: int
) -> None:
    """Take the resources of a step at ``t``."""
    for resource in (first[step], second[step]):
        if resource >= 0:
            count[resource] = _take(begin[resource], end[resource], count[resource], period, t, time)


@njit(cache=True)
def place(
    begin: Ints,
    end: Ints,
    count: Ints,
    period: int,
    release: int,
    latest: int,
    duration: Ints,
    first: Ints,
    second: Ints,
    after: Ints,
    also: Ints,
    times: Ints,
) -> bool:
    """Take a moment, as early as can be, for every step of a micro-batch that leaves at ``release`` at the earliest.

    ``times`` receives the starts. False where some step finds none, or ends after ``latest``; then nothing is taken.
    """
    for step in range(len(duration)):
        ready = release
        if after[step] >= 0:
            ready = times[after[step]] + duration[after[step]]
        if also[step] >= 0:
            ready = max(ready, times[also[step]] + duration[also[step]])
        one, other = first[step], second[step]
        t = fit(begin[one], end[one], count[one], period, ready, duration[step])
        while t >= 0 and other >= 0:
            free = fit(begin[other], end[other], count[other], period, t, duration[step])
            if free == t:
                break
            t = -1
            if 0 <= free <= ready + period:
                t = fit(begin[one], end[one], count[one], period, free, duration[step])
        if t < 0 or t + duration[step] > latest:
            give_back(begin, end, count, period, duration, first, second, times, step)
            return False
        times[step] = t
        take(begin, end, count, period, first, second, step, t, duration[step])
    return True


@njit(cache=True)
def circle(
    releases: Ints,
    period: int,
    num_groups: int,
    busiest: int,
    duration: Ints,
    first: Ints,
    second: Ints,
    after: Ints,
    also: Ints,
) -> tuple[Ints, bool]:
    """Starts of all steps of the micro-batches that leave at ``releases`` in every period; whether they fit."""
    members, steps = len(releases), len(duration)
    size = members * busiest + 1  # one interval may lie across the end of the circle
    begin, end = np.empty((3 * num_groups, size), np.int64), np.empty((3 * num_groups, size), np.int64)
    count = np.zeros(3 * num_groups, np.int64)
    times = np.zeros((members, steps), np.int64)
    for member in range(members):
        if not place(
            begin, end, count, period, releases[member], NEVER, duration, first, second, after, also, times[member]
        ):
            return times, False
    return times, True


@njit(cache=True)
def most_alive(times: Ints, period: int, num_groups: int, group: Ints, duration: Ints, compute: Ints) -> int:
    """The most activations alive on a group when the micro-batches of ``times`` come round every ``period``."""
    members, stages = times.shape[0], len(group)
    most = 0
    moment, change = np.empty(2 * members * stages, np.int64), np.empty(2 * members * stages, np.int64)
    for number in range(num_groups):
        alive = size = 0
        for stage in range(stages):
            if group[stage] != number:
                continue
            begins, ends = compute[stage], compute[2 * stages - 1 - stage]
            for member in range(members):
                start = times[member, begins]
                # an activation of no duration counts for a moment
                stop = max(times[member, ends] + duration[ends], start + 1)
                alive += -start // period - -stop // period
                moment[size], change[size] = start % period, 1
                moment[size + 1], change[size + 1] = stop % period, -1
                size += 2
        # ends before starts where both are at one moment
        for at in np.argsort(2 * moment[:size] + (change[:size] + 1) // 2):
            if moment[at] > 0:
                alive += change[at]
            most = max(most, alive)
    return most
