"""What the event engine is made of: a heap of events, queues in order of service, edges by their source. Compiled.

A queue holds *nodes*: 2 * task where the queue serves the task's first resource, 2 * task + 1 for its second.
"""

from __future__ import annotations

import numpy as np
from numba import njit
from numpy.typing import NDArray

Ints = NDArray[np.int64]


@njit(cache=True)
def successors_of(before: Ints, after: Ints, num_tasks: int) -> tuple[Ints, Ints, Ints]:
    """The edges sorted by their source (offsets and targets), and how many edges each task waits for."""
    starts = np.zeros(num_tasks + 1, np.int64)
    missing = np.zeros(num_tasks, np.int64)
    for edge in range(len(before)):
        starts[before[edge] + 1] += 1
        missing[after[edge]] += 1
    for task in range(num_tasks):
        starts[task + 1] += starts[task]
    fill = starts[:-1].copy()
    successors = np.empty(len(before), np.int64)
    for edge in range(len(before)):
        successors[fill[before[edge]]] = after[edge]
        fill[before[edge]] += 1
    return starts, successors, missing


@njit(cache=True)
def push(heap_time: Ints, heap_task: Ints, size: int, time: int, task: int) -> None:
    """Insert into a binary heap ordered by (time, task); ``size`` counts the entries before."""
    at = size
    while at > 0:
        parent = (at - 1) >> 1
        if heap_time[parent] < time or (heap_time[parent] == time and heap_task[parent] < task):
            break
        heap_time[at] = heap_time[parent]
        heap_task[at] = heap_task[parent]
        at = parent
    heap_time[at] = time
    heap_task[at] = task


@njit(cache=True)
def pop(heap_time: Ints, heap_task: Ints, size: int) -> None:
    """Remove the root of a heap of ``size`` entries."""
    last = size - 1
    time, task = heap_time[last], heap_task[last]
    at = 0
    while True:
        child = 2 * at + 1
        if child >= last:
            break
        right = child + 1
        if right < last and (
            heap_time[right] < heap_time[child]
            or (heap_time[right] == heap_time[child] and heap_task[right] < heap_task[child])
        ):
            child = right
        if time < heap_time[child] or (time == heap_time[child] and task < heap_task[child]):
            break
        heap_time[at] = heap_time[child]
        heap_task[at] = heap_task[child]
        at = child
    heap_time[at] = time
    heap_task[at] = task


@njit(cache=True)
def goes_first(task: int, other: int, priority: Ints, ready: Ints) -> bool:
    """Whether a free resource takes ``task`` rather than ``other``."""
    if priority[task] != priority[other]:
        return bool(priority[task] < priority[other])
    if ready[task] != ready[other]:
        return bool(ready[task] < ready[other])
    return task < other


@njit(cache=True)
def enqueue(
    node: int, queue: int, link: Ints, back: Ints, heads: Ints, tails: Ints, priority: Ints, ready: Ints
) -> None:
    """Insert a node (2 * task, + 1 for its second resource) in the order in which ``queue`` serves."""
    before = tails[queue]
    while before >= 0 and goes_first(node >> 1, before >> 1, priority, ready):
        before = back[before]
    if before < 0:
        after = heads[queue]
        heads[queue] = node
    else:
        after = link[before]
        link[before] = node
    link[node], back[node] = after, before
    if after < 0:
        tails[queue] = node
    else:
        back[after] = node


@njit(cache=True)
def dequeue(node: int, queue: int, link: Ints, back: Ints, heads: Ints, tails: Ints) -> None:
    before, after = back[node], link[node]
    if before < 0:
        heads[queue] = after
    else:
        link[before] = after
    if after < 0:
        tails[queue] = before
    else:
        back[after] = before
