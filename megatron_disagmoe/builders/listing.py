"""List scheduling: a group that is free takes, of what could start now, what matters most; within a cap on activations.

Transfers are served as the simulator serves them. What comes out is an order of start, so it can always run.

The cap. Forward of a stage and micro-batch takes one of its group's ``max_live`` places, and gives it back when its
backward ends (B, or W). Places alone would deadlock: young micro-batches could hold all of them while an old one, which
must get through to give any back, needs one more. So the places a group lends to micro-batches younger than the oldest
one that still has forwards to do there are at most ``max_live`` minus the group's number of stages. Then the oldest
always finds its places, in every group; once its forwards are done so do its backwards, and the next is the oldest.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numba import njit
from numpy.typing import NDArray

from megatron_disagmoe.schedules.orders import B, F, I, Ints, Orders, W, group_of_stage, sorted_orders
from megatron_disagmoe.simulator.costs import StageCosts
from megatron_disagmoe.simulator.engine import Floats, ticks_per_unit
from megatron_disagmoe.simulator.queues import dequeue, enqueue, pop, push, successors_of
from megatron_disagmoe.simulator.simulate import durations, transfers_of

Bools = NDArray[np.bool_]

#: A cap that never binds.
_NO_CAP = 1 << 40


@dataclass(frozen=True)
class Started:
    """A run: when every action starts and ends, and its place in the sequence of all starts."""

    start: Floats
    end: Floats
    turn: Ints

    @property
    def makespan(self) -> float:
        """When the last action ended."""
        return float(self.end.max(initial=0.0))


class Listing:
    """The actions of ``orders``, whose order is only kept where ``chained``; run under as many priorities as you like.

    ``chained[k]``: action k must not start before action k - 1 of the same group has.
    """

    def __init__(self, orders: Orders, costs: StageCosts, *, chained: Bools | None = None) -> None:
        self.orders = orders
        count, groups = len(orders), len(orders.bounds) - 1
        group = orders.group
        transfers = transfers_of(orders, costs)
        transfer = count + np.arange(len(transfers))
        used = transfers.user >= 0
        release = count + len(transfers) + np.arange(orders.num_micro_batches)
        before = [transfers.maker, transfer[used], release]
        after = [transfer, transfers.user[used], self._position(F)[: orders.num_micro_batches]]
        for earlier, later in ((F, B), (F, I), (I, W)):
            both = (self._position(earlier) >= 0) & (self._position(later) >= 0)
            before.append(self._position(earlier)[both])
            after.append(self._position(later)[both])
        if chained is not None:
            at = np.flatnonzero(chained)
            before.append(at - 1)
            after.append(at)
        self._before, self._after = np.concatenate(before), np.concatenate(after)
        rest = len(transfers) + orders.num_micro_batches
        self._duration = np.concatenate((durations(orders, costs), transfers.duration))
        none = np.full(orders.num_micro_batches, -1, np.int64)
        self._first = np.concatenate((2 * groups + group, transfers.sender, none))
        self._second = np.concatenate((np.full(count, -1, np.int64), groups + transfers.receiver, none))
        gives = (orders.kind == B) | (orders.kind == W)
        self._takes = _padded(np.where(orders.kind == F, group, -1), rest, -1)
        self._gives = _padded(np.where(gives, group, -1), rest, -1)
        self._micro_batch = _padded(orders.micro_batch, rest, 0)
        self._num_stages = np.bincount(group_of_stage(orders.placement), minlength=groups)

    def _position(self, kind: int) -> Ints:
        """Position of the action of ``kind`` for every stage and micro-batch, -1 where there is none."""
        orders = self.orders
        table = np.full((2 * orders.placement.num_layers + 1) * orders.num_micro_batches, -1, np.int64)
        at = np.flatnonzero(orders.kind == kind)
        table[self._key[at]] = at
        return table

    @cached_property
    def _key(self) -> Ints:
        return self.orders.stage * self.orders.num_micro_batches + self.orders.micro_batch

    @property
    def actions(self) -> Ints:
        """A number of every action that depends on its kind, stage and micro-batch only."""
        orders = self.orders
        return orders.kind * (2 * orders.placement.num_layers + 1) * orders.num_micro_batches + self._key

    def forward(
        self,
        priority: Floats,
        *,
        max_live: int | None = None,
        careful: bool = True,
        release: Floats | None = None,
    ) -> Started:
        """Run from the first action to the last; the smallest ``priority`` goes first.

        Args:
            max_live: places of every group; at least the stages of the fullest one.
            careful: lend places as the module's docstring says; needless where a chain is known to fit.
            release: when each micro-batch may begin.

        Raises:
            ValueError: where nothing can go on before everything has run: a chain that does not fit the cap.
        """
        return self._run(priority, self._before, self._after, max_live, careful, release)

    def backward(self, priority: Floats) -> Started:
        """Run with time reversed, every action after those that need it; no cap."""
        return self._run(priority, self._after, self._before, None, False, None)

    def in_turn(self, started: Started) -> Orders:
        """The orders in which ``started`` ran the actions."""
        orders = self.orders
        return sorted_orders(
            orders.placement,
            num_micro_batches=orders.num_micro_batches,
            forward_only=orders.forward_only,
            kind=orders.kind,
            stage=orders.stage,
            micro_batch=orders.micro_batch,
            keys=(started.turn,),
        )

    def _run(
        self,
        priority: Floats,
        before: Ints,
        after: Ints,
        max_live: int | None,
        careful: bool,
        release: Floats | None,
    ) -> Started:
        n, groups, count = self.orders.num_micro_batches, len(self._num_stages), len(self.orders)
        duration = np.concatenate((self._duration, np.zeros(n) if release is None else release))
        scale = ticks_per_unit(duration)
        ticks = np.rint(duration * scale).astype(np.int64)
        rank = np.empty(count, np.int64)
        rank[np.argsort(priority, kind="stable")] = np.arange(count)
        start, turn, done = _list_run(
            ticks,
            self._first,
            self._second,
            _padded(rank, len(ticks) - count, 0),
            *successors_of(before, after, len(ticks)),
            self._takes,
            self._gives,
            self._micro_batch,
            _NO_CAP if max_live is None or self.orders.forward_only else max_live,
            self._num_stages if careful else np.zeros(groups, np.int64),
            n,
        )
        if done < len(ticks):
            raise ValueError(f"{len(ticks) - done} of {len(ticks)} tasks never start")
        end = start + ticks
        return Started(start[:count] / scale, end[:count] / scale, turn[:count])


def _padded(values: Ints, more: int, value: int) -> Ints:
    return np.concatenate((values, np.full(more, value, np.int64))).astype(np.int64)


@njit(cache=True)
def _is_admitted(
    task: int, takes: Ints, micro_batch: Ints, cap: int, num_stages: Ints, live: Ints, oldest: Ints, young: Ints
) -> bool:
    """Whether the task needs no place, or its group lends it one."""
    group = takes[task]
    if group < 0:
        return True
    if live[group] >= cap:
        return False
    return bool(micro_batch[task] == oldest[group] or young[group] < cap - num_stages[group])


@njit(cache=True)
def _candidate(
    queue: int,
    link: Ints,
    heads: Ints,
    first: Ints,
    second: Ints,
    busy: Bools,
    takes: Ints,
    micro_batch: Ints,
    cap: int,
    num_stages: Ints,
    live: Ints,
    oldest: Ints,
    young: Ints,
) -> int:
    """The first task of a free resource's queue that could start now, -1 where none can."""
    node = heads[queue]
    while node >= 0:
        task = node >> 1
        other = first[task] if node & 1 else second[task]
        if (other < 0 or not busy[other]) and _is_admitted(
            task, takes, micro_batch, cap, num_stages, live, oldest, young
        ):
            return task
        node = link[node]
    return -1


@njit(cache=True)
def _take(group: int, mine: int, live: Ints, oldest: Ints, young: Ints, held: Ints, todo: Ints) -> None:
    """Lend a place to micro-batch ``mine``."""
    live[group] += 1
    held[group, mine] += 1
    todo[group, mine] -= 1
    if mine > oldest[group]:
        young[group] += 1
    while oldest[group] < todo.shape[1] and todo[group, oldest[group]] == 0:
        oldest[group] += 1
        if oldest[group] < todo.shape[1]:
            young[group] -= held[group, oldest[group]]


@njit(cache=True)
def _list_run(
    duration: Ints,
    first: Ints,
    second: Ints,
    priority: Ints,
    starts: Ints,
    successors: Ints,
    missing: Ints,
    takes: Ints,
    gives: Ints,
    micro_batch: Ints,
    cap: int,
    num_stages: Ints,
    n: int,
) -> tuple[Ints, Ints, int]:
    """The engine's loop (``simulator.engine``) with places; start and turn of every task, and how many ended.

    Resources: the sending ports of the groups, their receiving ports, their compute.
    """
    num_tasks, groups = len(duration), len(num_stages)
    num_resources = 3 * groups
    start, turn = np.full(num_tasks, -1, np.int64), np.zeros(num_tasks, np.int64)
    ready = np.zeros(num_tasks, np.int64)
    link, back = np.full(2 * num_tasks, -1, np.int64), np.full(2 * num_tasks, -1, np.int64)
    heads, tails = np.full(num_resources, -1, np.int64), np.full(num_resources, -1, np.int64)
    busy, dirty = np.zeros(num_resources, np.bool_), np.zeros(num_resources, np.bool_)
    changed = np.empty(num_resources, np.int64)
    heap_time, heap_task = np.empty(num_tasks, np.int64), np.empty(num_tasks, np.int64)
    live, young, oldest = np.zeros(groups, np.int64), np.zeros(groups, np.int64), np.zeros(groups, np.int64)
    held, todo = np.zeros((groups, n), np.int64), np.zeros((groups, n), np.int64)
    for task in range(num_tasks):
        if takes[task] >= 0:
            todo[takes[task], micro_batch[task]] += 1
    fresh = np.empty(num_tasks, np.int64)
    num_fresh = 0
    for task in range(num_tasks):
        if missing[task] == 0:
            fresh[num_fresh] = task
            num_fresh += 1
    size = done = num_changed = now = turns = 0
    while True:
        for at in range(num_fresh):
            task = fresh[at]
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
                task = _candidate(
                    resource, link, heads, first, second, busy, takes, micro_batch, cap, num_stages, live, oldest, young
                )
            if task < 0:
                dirty[resource] = False
                num_changed -= 1
                continue
            queue = resource
            while second[task] >= 0:  # until both ports agree on a task
                queue = second[task] if queue == first[task] else first[task]
                rival = _candidate(
                    queue, link, heads, first, second, busy, takes, micro_batch, cap, num_stages, live, oldest, young
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
            if takes[task] >= 0:
                _take(takes[task], micro_batch[task], live, oldest, young, held, todo)
        if size == 0:
            break
        now = heap_time[0]
        num_fresh = 0
        while size > 0 and heap_time[0] == now:
            task = heap_task[0]
            pop(heap_time, heap_task, size)
            size -= 1
            done += 1
            group = gives[task]
            if group >= 0:
                live[group] -= 1
                held[group, micro_batch[task]] -= 1
                if micro_batch[task] > oldest[group]:
                    young[group] -= 1
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
                    fresh[num_fresh] = after
                    num_fresh += 1
    return start, turn, done
