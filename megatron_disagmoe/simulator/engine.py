"""The event engine: tasks on resources, each started as early as its inputs and its resources allow.

Knows nothing of pipelines. A task holds up to two resources for its duration (a compute unit; a sending and a receiving
port) and waits for other tasks. A fixed order on a resource is a chain of dependencies and needs no resource. Elsewhere
a free resource takes the waiting task with the smallest (priority, moment it became ready, index) among those whose
other resource is free too: nothing idles behind a task that cannot start.

*Pools.* A task may take a place of a pool when it starts, which another task gives back when it ends; a pool has a
limited number of places. That alone would deadlock: young owners could hold all while an old one, which must get
through to give any back, needs one more. So the places a pool lends to owners younger than the oldest one that still
has tasks to start there are at most all but its reserve. A pool whose reserve is what one owner needs at once always
lets the oldest through; then the next is the oldest.

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
Bools = NDArray[np.bool_]

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
class Pools:
    """Places that tasks hold, see the module's docstring. ``takes``, ``gives``, ``owner`` have one entry a task.

    ``takes``, ``gives``: the pool of which a task takes or gives back a place, -1 for none. ``owner``: a smaller number
    is older, below ``num_owners``. ``places``: of every pool. ``reserve``: of each pool.
    """

    takes: Ints
    gives: Ints
    owner: Ints
    num_owners: int
    places: int
    reserve: Ints


@dataclass(frozen=True)
class Times:
    """When each task started and ended, in the unit of the durations.

    ``turn``: a task's place in the sequence of all starts, for those that hold a resource.
    """

    start: Floats
    end: Floats
    turn: Ints

    @property
    def makespan(self) -> float:
        """When the last task ended."""
        return float(self.end.max(initial=0.0))


def run(tasks: Tasks, pools: Pools | None = None) -> Times:
    """Run ``tasks`` from time 0.

    Raises:
        ValueError: where some tasks never start: they wait for each other in a circle, or for places.
    """
    scale = ticks_per_unit(tasks.duration)
    ticks = np.rint(tasks.duration * scale).astype(np.int64)
    starts, successors, missing = successors_of(tasks.before, tasks.after, len(ticks))
    none = np.empty(0, np.int64)
    lent = pools or Pools(none, none, none, num_owners=0, places=0, reserve=none)
    start, turn, done = _run(
        ticks,
        tasks.first,
        tasks.second,
        tasks.priority,
        starts,
        successors,
        missing,
        tasks.num_resources,
        None if pools is None else True,
        lent.takes,
        lent.gives,
        lent.owner,
        lent.num_owners,
        lent.places,
        lent.reserve,
    )
    if done < len(ticks):
        stuck = int(np.flatnonzero(start < 0)[0])
        raise ValueError(f"{len(ticks) - done} of {len(ticks)} tasks never start, the first is task {stuck}")
    return Times(start / scale, (start + ticks) / scale, turn)


def ticks_per_unit(durations: Floats) -> float:
    """Ticks in one unit of time: a power of ten, so that decimal durations stay exact."""
    longest = float(durations.max(initial=0.0))
    return 10.0 ** (_DIGITS - math.ceil(math.log10(longest))) if longest > 0 else 1.0


@njit(cache=True)
def _is_lent(
    task: int, takes: Ints, owner: Ints, places: int, reserve: Ints, lent: Ints, oldest: Ints, young: Ints
) -> bool:
    """Whether the task needs no place, or its pool lends it one."""
    pool = takes[task]
    if pool < 0:
        return True
    if lent[pool] >= places:
        return False
    return bool(owner[task] == oldest[pool] or young[pool] < places - reserve[pool])


@njit(cache=True)
def _lend(pool: int, owner: int, lent: Ints, oldest: Ints, young: Ints, held: Ints, todo: Ints) -> None:
    lent[pool] += 1
    held[pool, owner] += 1
    todo[pool, owner] -= 1
    if owner > oldest[pool]:
        young[pool] += 1
    while oldest[pool] < todo.shape[1] and todo[pool, oldest[pool]] == 0:
        oldest[pool] += 1
        if oldest[pool] < todo.shape[1]:
            young[pool] -= held[pool, oldest[pool]]


@njit(cache=True)
def _candidate(queue: int, link: Ints, heads: Ints, first: Ints, second: Ints, busy: Bools) -> int:
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
def _lent_candidate(
    queue: int,
    link: Ints,
    heads: Ints,
    first: Ints,
    second: Ints,
    busy: Bools,
    takes: Ints,
    owner: Ints,
    places: int,
    reserve: Ints,
    lent: Ints,
    oldest: Ints,
    young: Ints,
) -> int:
    """``_candidate`` among the tasks that need no place or are lent one."""
    node = heads[queue]
    while node >= 0:
        task = node >> 1
        other = first[task] if node & 1 else second[task]
        if (other < 0 or not busy[other]) and _is_lent(task, takes, owner, places, reserve, lent, oldest, young):
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
    lends: bool | None,
    takes: Ints,
    gives: Ints,
    owner: Ints,
    num_owners: int,
    places: int,
    reserve: Ints,
) -> tuple[Ints, Ints, int]:
    """Start of every task in ticks (-1 where it never starts), its turn, and how many ended.

    ``lends``: None where there are no pools; then numba leaves out all that has to do with them.
    """
    num_tasks = len(duration)
    start, turn = np.full(num_tasks, -1, np.int64), np.zeros(num_tasks, np.int64)
    ready = np.zeros(num_tasks, np.int64)
    link, back = np.full(2 * num_tasks, -1, np.int64), np.full(2 * num_tasks, -1, np.int64)
    heads, tails = np.full(num_resources, -1, np.int64), np.full(num_resources, -1, np.int64)
    busy, dirty = np.zeros(num_resources, np.bool_), np.zeros(num_resources, np.bool_)
    changed = np.empty(num_resources, np.int64)  # free resources to look at, each once
    heap_time, heap_task = np.empty(num_tasks, np.int64), np.empty(num_tasks, np.int64)
    pools = len(reserve)
    lent, young, oldest = np.zeros(pools, np.int64), np.zeros(pools, np.int64), np.zeros(pools, np.int64)
    held, todo = np.zeros((pools, num_owners), np.int64), np.zeros((pools, num_owners), np.int64)
    if lends is not None:
        for task in range(num_tasks):
            if takes[task] >= 0:
                todo[takes[task], owner[task]] += 1
    fresh = np.flatnonzero(missing == 0)  # tasks that became ready now
    fresh_list = np.empty(num_tasks, np.int64)
    num_fresh = len(fresh)
    fresh_list[:num_fresh] = fresh
    size = done = num_changed = now = turns = 0
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
            task = -1
            if not busy[resource]:
                if lends is None:
                    task = _candidate(resource, link, heads, first, second, busy)
                else:
                    task = _lent_candidate(
                        resource, link, heads, first, second, busy, takes, owner, places, reserve, lent, oldest, young
                    )
            if task < 0:
                dirty[resource] = False
                num_changed -= 1
                continue
            # The task's other resource may owe itself to a task that waits longer: follow until both agree.
            queue = resource
            while second[task] >= 0:
                queue = second[task] if queue == first[task] else first[task]
                if lends is None:
                    rival = _candidate(queue, link, heads, first, second, busy)
                else:
                    rival = _lent_candidate(
                        queue, link, heads, first, second, busy, takes, owner, places, reserve, lent, oldest, young
                    )
                if rival == task:
                    break
                task = rival
            start[task], turn[task] = now, turns
            turns += 1
            push(heap_time, heap_task, size, now + duration[task], task)
            size += 1
            dequeue(2 * task, first[task], link, back, heads, tails)
            busy[first[task]] = True
            if second[task] >= 0:
                dequeue(2 * task + 1, second[task], link, back, heads, tails)
                busy[second[task]] = True
            if lends is not None and takes[task] >= 0:
                _lend(takes[task], owner[task], lent, oldest, young, held, todo)
        if size == 0:
            break
        now = heap_time[0]
        num_fresh = 0
        while size > 0 and heap_time[0] == now:
            task = heap_task[0]
            pop(heap_time, heap_task, size)
            size -= 1
            done += 1
            if lends is not None and gives[task] >= 0:
                pool = gives[task]
                lent[pool] -= 1
                held[pool, owner[task]] -= 1
                if owner[task] > oldest[pool]:
                    young[pool] -= 1
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
    return start, turn, done
