"""List scheduling: a group that is free takes, of what could start now, what matters most; within a cap on activations.

Transfers are served as the simulator serves them. What comes out is an order of start, so it can always run.

The cap. Forward of a stage and micro-batch takes one of its group's ``max_live`` places, and its backward (B, or W)
gives it back when it ends. A group keeps as many in reserve as it has stages (the engine's pools): then the oldest
micro-batch always finds its places, in every group; once its forwards are done so do its backwards.
"""

from __future__ import annotations

from functools import cached_property

import numpy as np

from megatron_disagmoe.schedules.orders import B, F, I, Ints, Orders, W, group_of_stage, sorted_orders
from megatron_disagmoe.simulator.costs import StageCosts
from megatron_disagmoe.simulator.engine import Bools, Floats, Pools, Tasks, Times, run
from megatron_disagmoe.simulator.simulate import durations, transfers_of


class Listing:
    """The actions of ``orders``, whose order is only kept where ``chained``; run under as many priorities as you like.

    ``chained[k]``: action k must not start before action k - 1 of the same group has. ``redispatch``: FFN stages keep
    nothing from forward to backward, so they take no place.
    """

    def __init__(
        self, orders: Orders, costs: StageCosts, *, chained: Bools | None = None, redispatch: bool = False
    ) -> None:
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
        kept = ~((orders.stage % 2 == 1) & redispatch)
        gives = ((orders.kind == B) | (orders.kind == W)) & kept
        self._takes = _padded(np.where((orders.kind == F) & kept, group, -1), rest, -1)
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
    ) -> Times:
        """Run from the first action to the last; the smallest ``priority`` goes first.

        Args:
            max_live: places of every group; at least the stages of the fullest one.
            careful: lend places as the module's docstring says; needless where a chain is known to fit.
            release: when each micro-batch may begin.

        Raises:
            ValueError: where nothing can go on before everything has run: a chain that does not fit the cap.
        """
        return self._run(priority, self._before, self._after, max_live, careful, release)

    def backward(self, priority: Floats) -> Times:
        """Run with time reversed, every action after those that need it; no cap."""
        return self._run(priority, self._after, self._before, None, False, None)

    def in_turn(self, started: Times) -> Orders:
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
    ) -> Times:
        n, groups, count = self.orders.num_micro_batches, len(self._num_stages), len(self.orders)
        duration = np.concatenate((self._duration, np.zeros(n) if release is None else release))
        rank = np.empty(count, np.int64)
        rank[np.argsort(priority, kind="stable")] = np.arange(count)
        tasks = Tasks(
            duration=duration,
            first=self._first,
            second=self._second,
            priority=_padded(rank, len(duration) - count, 0),
            before=before,
            after=after,
            num_resources=3 * groups,
        )
        pools = None
        if max_live is not None and not self.orders.forward_only:
            reserve = self._num_stages if careful else np.zeros(groups, np.int64)
            pools = Pools(self._takes, self._gives, self._micro_batch, n, max_live, reserve)
        times = run(tasks, pools)
        return Times(times.start[:count], times.end[:count], times.turn[:count])


def _padded(values: Ints, more: int, value: int) -> Ints:
    return np.concatenate((values, np.full(more, value, np.int64))).astype(np.int64)
