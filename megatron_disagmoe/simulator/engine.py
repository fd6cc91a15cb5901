"""The event engine: tasks on resources, each started as early as its inputs and its resources allow.

Knows nothing of pipelines. A task holds up to two resources for its duration (a compute unit; a sending and a receiving
port) and waits for other tasks. A fixed order on a resource is a chain of dependencies and needs no resource. Elsewhere
a free resource takes the waiting task with the smallest (priority, moment it became ready, index) among those whose
other resource is free too: nothing idles behind a task that cannot start.

Times are counted in integer ticks, so sums are exact, ties are ties, and a run is the same on every machine.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numba import njit
from numpy.typing import NDArray

from megatron_disagmoe.simulator.queues import dequeue, enqueue, pop, push, successors_of

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

#: Decimal digits that the longest task keeps; leaves room for 9 million of them in a row.
_DIGITS = 12


@dataclass(frozen=True)
class Tasks:
    """What to run. All arrays but the edges have one entry a task.

    ``first``, ``second``: resources held, -1 for none (``second`` needs ``first``). ``priority``: smaller goes first.
    ``before[k]`` must end before ``after[k]`` starts.
    """

    duration: Floats
    first: Ints
    second: Ints
    priority: Ints
    before: Ints
    after: Ints
    num_resources: int


@dataclass(frozen=True)
class Times:
    """When each task started and ended, in the unit of the durations."""

    start: Floats
    end: Floats

    @property
    def makespan(self) -> float:
        """When the last task ended."""
        return float(self.end.max(initial=0.0))


def run(tasks: Tasks) -> Times:
    """Run ``tasks`` from time 0.

    Raises:
        ValueError: where tasks wait for each other in a circle, so that some never start.
    """
    scale = ticks_per_unit(tasks.duration)
    ticks = np.rint(tasks.duration * scale).astype(np.int64)
    starts, successors, missing = successors_of(tasks.before, tasks.after, len(ticks))
    start, done = _run(
        ticks, tasks.first, tasks.second, tasks.priority, starts, successors, missing, tasks.num_resources
    )
    if done < len(ticks):
        stuck = int(np.flatnonzero(start < 0)[0])
        raise ValueError(f"{len(ticks) - done} of {len(ticks)} tasks never start, the first is task {stuck}")
    return Times(start / scale, (start + ticks) / scale)


def ticks_per_unit(durations: Floats) -> float:
    """Ticks in one unit of time: a power of ten, so that decimal durations stay exact."""
    longest = float(durations.max(initial=0.0))
    return 10.0 ** (_DIGITS - math.ceil(math.log10(longest))) if longest > 0 else 1.0


@njit(cache=True)
def _candidate(queue: int, link: Ints, heads: Ints, first: Ints, second: Ints, busy: NDArray[np.bool_]) -> int:
    """The first task of a free resource's queue that could start now, -1 where none can."""
    node = heads[queue]
    while node >= 0:
        task = node >> 1
        other = first[task] if node & 1 else second[task]
        if other < 0 or not busy[other]:
            return task
        node = link[node]
    return -1


@njit(cache=True)
def _run(
    duration: Ints,
    first: Ints,
    second: Ints,
    priority: Ints,
    starts: Ints,
    successors: Ints,
    missing: Ints,
    num_resources: int,
) -> tuple[Ints, int]:
    """Start of every task in ticks (-1 where it never starts), and how many ended."""
    num_tasks = len(duration)
    start = np.full(num_tasks, -1, np.int64)
    ready = np.zeros(num_tasks, np.int64)
    link, back = np.full(2 * num_tasks, -1, np.int64), np.full(2 * num_tasks, -1, np.int64)
    heads, tails = np.full(num_resources, -1, np.int64), np.full(num_resources, -1, np.int64)
    busy, dirty = np.zeros(num_resources, np.bool_), np.zeros(num_resources, np.bool_)
    changed = np.empty(num_resources, np.int64)  # free resources to look at, each once
    heap_time, heap_task = np.empty(num_tasks, np.int64), np.empty(num_tasks, np.int64)
    fresh = np.flatnonzero(missing == 0)  # tasks that became ready now
    fresh_list = np.empty(num_tasks, np.int64)
    num_fresh = len(fresh)
    fresh_list[:num_fresh] = fresh
    size = done = num_changed = 0
    now = 0
    while True:
        for at in range(num_fresh):
            task = fresh_list[at]
            ready[task] = now
            if first[task] < 0:
                start[task] = now
                push(heap_time, heap_task, size, now + duration[task], task)
                size += 1
                continue
            enqueue(2 * task, first[task], link, back, heads, tails, priority, ready)
            if second[task] >= 0:
                enqueue(2 * task + 1, second[task], link, back, heads, tails, priority, ready)
            if not dirty[first[task]]:
                dirty[first[task]] = True
                changed[num_changed] = first[task]
                num_changed += 1
        while num_changed > 0:
            resource = changed[num_changed - 1]
            task = -1 if busy[resource] else _candidate(resource, link, heads, first, second, busy)
            if task < 0:
                dirty[resource] = False
                num_changed -= 1
                continue
            # The task's other resource may owe itself to a task that waits longer: follow until both agree.
            queue = resource
            while second[task] >= 0:
                queue = second[task] if queue == first[task] else first[task]
                rival = _candidate(queue, link, heads, first, second, busy)
                if rival == task:
                    break
                task = rival
            start[task] = now
            push(heap_time, heap_task, size, now + duration[task], task)
            size += 1
            dequeue(2 * task, first[task], link, back, heads, tails)
            busy[first[task]] = True
            if second[task] >= 0:
                dequeue(2 * task + 1, second[task], link, back, heads, tails)
                busy[second[task]] = True
        if size == 0:
            break
        now = heap_time[0]
        num_fresh = 0
        while size > 0 and heap_time[0] == now:
            task = heap_task[0]
            pop(heap_time, heap_task, size)
            size -= 1
            done += 1
            for resource in (first[task], second[task]):
                if resource >= 0:
                    busy[resource] = False
                    if not dirty[resource]:
                        dirty[resource] = True
                        changed[num_changed] = resource
                        num_changed += 1
            for edge in range(starts[task], starts[task + 1]):
                after = successors[edge]
                missing[after] -= 1
                if missing[after] == 0:
                    fresh_list[num_fresh] = after
                    num_fresh += 1
    return start, done
