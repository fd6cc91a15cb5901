"""Forward-backward improvement of computes and messages together: every gap of a group or port may be filled.

Where the network is as busy as the groups, the order of the messages decides as much as that of the computes. List
scheduling (``listing``) serves messages as they come; here everything, computes and messages, is laid one after the
other into the timetable of all groups and ports, each as early as it fits in, the most urgent first. Time reversed, by
when each ended, that pushes everything as late as it can go; laid forward again by those times it ends sooner.

A port may then stay idle for a message that is to come, so the order of messages is part of what is found (``listed``
writes it into the schedule).

Under a cap every group has as many places as may be alive: the forward that takes a place comes after the backward that
gave it back in the timetable before. So whatever else moves, no more are alive.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
from numba import njit

from megatron_disagmoe.builders.folding import progress
from megatron_disagmoe.builders.search import lives
from megatron_disagmoe.builders.timetable import NEVER, fit, take
from megatron_disagmoe.schedules.orders import B, D, F, I, Ints, Orders, PortOrders, W
from megatron_disagmoe.simulator.costs import StageCosts
from megatron_disagmoe.simulator.engine import ticks_per_unit
from megatron_disagmoe.simulator.simulate import Run, durations, simulate_orders, transfers_of


class Gapped:
    """The actions and transfers of ``orders``, to be laid in whatever order; starts and keys are of both, in ticks."""

    def __init__(self, orders: Orders, costs: StageCosts, *, max_live: int | None = None) -> None:
        self.orders, self.transfers, self._costs = orders, transfers_of(orders, costs), costs
        count, groups = len(orders), len(orders.bounds) - 1
        time = np.concatenate((durations(orders, costs), self.transfers.duration))
        self.scale = ticks_per_unit(time)
        self.duration = np.rint(time * self.scale).astype(np.int64)
        self._first = np.concatenate((2 * groups + orders.group, self.transfers.sender))
        self._second = np.concatenate((np.full(count, -1, np.int64), groups + self.transfers.receiver))
        number = count + np.arange(len(self.transfers))
        used = self.transfers.user >= 0
        before, after = [self.transfers.maker, number[used]], [number, self.transfers.user[used]]
        for earlier, later in ((F, B), (F, I), (I, W), (F, D)):
            ends = orders.position(earlier), orders.position(later)
            both = (ends[0] >= 0) & (ends[1] >= 0)
            before.append(ends[0][both])
            after.append(ends[1][both])
        self._before, self._after = np.concatenate(before), np.concatenate(after)
        self._max_live = None if orders.forward_only else max_live
        _, self._takes, self._gives = lives(orders, redispatch=bool((orders.kind == D).any()))
        way = 2 * progress(orders)
        self._progress = np.concatenate((way, way[self.transfers.maker] + 1))
        self._rank = self._progress
        self._link(self._before, self._after)
        self._num_resources = 3 * groups
        second = self._second[self._second >= 0]
        self._room = int(max(np.bincount(self._first).max(), np.bincount(second, minlength=1).max())) + 1

    def starts(self, run: Run) -> Ints:
        """Those of a run of the same orders."""
        return np.rint(np.concatenate((run.start, run.transfer_start)) * self.scale).astype(np.int64)

    def hand_out_places(self, starts: Ints) -> None:
        """Under a cap: from now on keep every place with those who have it in the timetable ``starts``."""
        if self._max_live is None:
            return
        orders, count = self.orders, len(self.orders)
        order = np.lexsort((self._progress, self.duration > 0, starts))
        self._rank = np.empty(len(order), np.int64)
        self._rank[order] = np.arange(len(order))
        computes = order[order < count]
        before, after = [self._before], [self._after]
        for number in range(len(orders.bounds) - 1):
            mine = computes[(computes >= orders.bounds[number]) & (computes < orders.bounds[number + 1])]
            takes, gives = mine[self._takes[mine]], mine[self._gives[mine]]
            before.append(gives[: max(0, len(takes) - self._max_live)])
            after.append(takes[self._max_live :])
        self._link(np.concatenate(before), np.concatenate(after))

    def _link(self, before: Ints, after: Ints) -> None:
        self._needs = _by_target(before, after, len(self.duration))
        self._needed = _by_target(after, before, len(self.duration))

    def forward(self, keys: Ints) -> Ints:
        """Starts when each is laid as early as it can be, the smallest key first."""
        order = np.argsort(self._rank, kind="stable")
        keys = _not_before(order, keys.copy(), *self._needs)
        return self._lay(np.lexsort((self._rank, keys)), *self._needs)

    def backward(self, ends: Ints) -> Ints:
        """Starts when each is laid as late as it can be, the largest of ``ends`` first; the first start is 0."""
        order = np.argsort(-self._rank, kind="stable")
        keys = _not_before(order, -ends, *self._needed)
        starts = self._lay(np.lexsort((-self._rank, keys)), *self._needed)
        until: Ints = starts + self.duration
        return until.max() - until

    def run(self, starts: Ints) -> Run:
        """What happens where everything keeps the order of ``starts``, each as early as it can be: no later.

        (But for actions that take no time, which may have been laid into the middle of another.) The k-th slot of every
        stage and of every edge is for its k-th micro-batch, which are alike: see ``orders.in_micro_batch_order``.
        """
        orders, maker, count = self.orders, self.transfers.maker, len(self.orders)
        slot = orders.kind * (2 * orders.placement.num_layers + 1) + orders.stage
        size = int(slot.max()) + 1
        slots = np.concatenate((slot, size * (1 + self.transfers.stride) + slot[maker]))
        micro_batch = np.concatenate((orders.micro_batch, orders.micro_batch[maker]))
        mine = np.empty_like(starts)
        mine[np.lexsort((micro_batch, slots))] = starts[np.lexsort((starts, slots))]
        order = np.lexsort((self._progress[:count], self.duration[:count] > 0, mine[:count], orders.group))
        place = np.empty(count, np.int64)
        place[order] = np.arange(count)
        turn = np.empty(len(maker), np.int64)
        turn[np.lexsort((self._progress[count:], mine[count:]))] = np.arange(len(maker))
        near = self.transfers.stride == 1
        in_turn = replace(
            orders,
            kind=orders.kind[order],
            stage=orders.stage[order],
            micro_batch=orders.micro_batch[order],
            ports=PortOrders(place[maker[near]], turn[near], turn[near]),
        )
        return simulate_orders(in_turn, self._costs)

    def _lay(self, order: Ints, offsets: Ints, needs: Ints) -> Ints:
        return _lay(order, self.duration, self._first, self._second, offsets, needs, self._num_resources, self._room)


def improved(run: Run, costs: StageCosts, *, passes: int, max_live: int | None = None) -> Iterator[Run]:
    """Runs of the actions of ``run`` after every pass, begun backward and begun forward, while they get shorter.

    In their orders every port keeps one (``Orders.ports``). With ``max_live``, which ``run`` must keep, hardly any
    breaks it: only where an action that takes no time was laid into the middle of another.
    """
    gapped = Gapped(run.orders, costs, max_live=max_live)
    starts = gapped.starts(run)
    gapped.hand_out_places(starts)
    for keys in (gapped.backward(starts + gapped.duration), starts):
        best = NEVER
        for _ in range(passes):
            gapped.hand_out_places(keys)
            laid = gapped.forward(keys)
            makespan = int((laid + gapped.duration).max())
            if makespan >= best:
                break
            best = makespan
            yield gapped.run(laid)
            gapped.hand_out_places(laid)
            keys = gapped.backward(laid + gapped.duration)


def _by_target(before: Ints, after: Ints, size: int) -> tuple[Ints, Ints]:
    """Offsets by target, and the sources of each."""
    order = np.argsort(after, kind="stable")
    return np.searchsorted(after[order], np.arange(size + 1)), before[order]


@njit(cache=True)
def _not_before(order: Ints, keys: Ints, offsets: Ints, needs: Ints) -> Ints:
    """``keys``, raised so that nothing has a smaller one than what it needs; ``order`` has needs first."""
    for task in order:
        for at in range(offsets[task], offsets[task + 1]):
            keys[task] = max(keys[task], keys[needs[at]])
    return keys


@njit(cache=True)
def _lay(
    order: Ints, duration: Ints, first: Ints, second: Ints, offsets: Ints, needs: Ints, num_resources: int, room: int
) -> Ints:
    """Starts of all tasks, laid in ``order`` into the first gap that is long enough."""
    begin, end = np.empty((num_resources, room), np.int64), np.empty((num_resources, room), np.int64)
    count = np.zeros(num_resources, np.int64)
    starts = np.zeros(len(duration), np.int64)
    for task in order:
        ready = 0
        for at in range(offsets[task], offsets[task + 1]):
            ready = max(ready, starts[needs[at]] + duration[needs[at]])
        time, one, other = duration[task], first[task], second[task]
        t = fit(begin[one], end[one], count[one], NEVER, ready, time)
        while other >= 0:
            free = fit(begin[other], end[other], count[other], NEVER, t, time)
            if free == t:
                break
            t = fit(begin[one], end[one], count[one], NEVER, free, time)
        starts[task] = t
        take(begin, end, count, NEVER, first, second, task, t, time)
    return starts
