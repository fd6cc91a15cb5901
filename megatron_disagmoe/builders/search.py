"""The best order within reach: members of the interleaved family, folded onto the placement, judged by the simulator.

Deterministic: the effort is counted in simulated actions, not in seconds, so all ranks find the same order.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from megatron_disagmoe.builders.folding import folded
from megatron_disagmoe.builders.interleaved import Shape, interleaved, padded
from megatron_disagmoe.builders.listing import Listing
from megatron_disagmoe.builders.redispatch import all_again, dispatched_again
from megatron_disagmoe.builders.sequential import sequential
from megatron_disagmoe.builders.weights import filled, split_at_once
from megatron_disagmoe.schedules.actions import Placement
from megatron_disagmoe.schedules.orders import B, F, I, Orders, W, group_of_stage
from megatron_disagmoe.simulator.bounds import Workload
from megatron_disagmoe.simulator.costs import StageCosts
from megatron_disagmoe.simulator.engine import Floats
from megatron_disagmoe.simulator.simulate import Run, simulate_orders
from megatron_disagmoe.simulator.step_bound import step_bound

Flags = NDArray[np.bool_]

#: Actions that a search may simulate: about a second.
EFFORT = 1_500_000
#: Orders of more actions than this are searched for once only, and hardly improved afterwards.
LARGE = 50_000
#: Share of the time that is given for half as many live activations, where there are 4 L of them.
_MEMORY = 2e-3
#: An order that takes this much longer on virtual groups is not looked at on the real ones.
_HOPELESS = 1.02
#: The search is over this close to the bound.
_CLOSE = 2e-4


@dataclass(frozen=True)
class Task:
    """What to build an order for."""

    placement: Placement
    num_micro_batches: int
    costs: StageCosts
    forward_only: bool
    split: bool
    max_live: int | None
    redispatch: bool = False

    @property
    def alone(self) -> StageCosts:
        """Costs of an order before its second dispatches are put in."""
        return all_again(self.costs) if self.redispatch else self.costs

    @property
    def bound(self) -> float:
        """No order is faster."""
        return step_bound(self.workload, max_live=self.max_live)

    @property
    def workload(self) -> Workload:
        """What there is to do."""
        return Workload.uniform(
            self.placement,
            self.costs,
            num_micro_batches=self.num_micro_batches,
            forward_only=self.forward_only,
            split_backward=self.split,
            redispatch=self.redispatch,
        )


@dataclass(frozen=True)
class Found:
    """An order on the real groups, its simulated run, and how it was made.

    ``makespan``: with second dispatches where the task has them; ``run`` is without.
    """

    run: Run
    live: int
    made_by: dict[str, object]
    makespan: float

    @property
    def orders(self) -> Orders:
        """The order."""
        return self.run.orders


def lives(orders: Orders, *, redispatch: bool) -> tuple[Flags, Flags, Flags]:
    """Of every action: whether its stage keeps an activation from forward to backward; whether one begins, and ends.

    ``redispatch``: FFN stages hold theirs while they compute only, and between ``I`` and ``W``.
    """
    kept = ~((orders.stage % 2 == 1) & redispatch)
    begins = ((orders.kind == F) & kept) | ((orders.kind == I) & ~kept)
    ends = ((orders.kind == B) & kept) | (orders.kind == W)
    return kept, begins, ends


def most_live(orders: Orders, *, redispatch: bool = False) -> int:
    """The most activations that a group holds at once; ``redispatch``: as ``lives`` has it."""
    if orders.forward_only:
        return 1
    kept, begins, ends = lives(orders, redispatch=redispatch)
    held = np.concatenate(([0], np.cumsum(begins.astype(np.int64) - ends)))  # every group ends at 0
    passing = ~kept & ((orders.kind == F) | (orders.kind == B))
    return int(max(held.max(), (held[:-1] + passing).max(initial=0)))


class Search:
    """Keeps the best order found so far and counts what finding it took."""

    def __init__(self, task: Task, *, effort: int = EFFORT, keep: int = 0) -> None:
        self.task = task
        self.bound = task.bound
        self.best: Found | None = None
        self.runners_up: list[Found] = []  # the ``keep`` best of all, the first of them ``best``
        self._keep = keep
        self._effort = effort
        self._values: dict[Shape, float] = {}

    @property
    def is_spent(self) -> bool:
        """No effort is left."""
        return self._effort <= 0

    @property
    def is_over(self) -> bool:
        """Nothing (much) is left to find, or the effort is spent."""
        return self.is_spent or (self.best is not None and self.best.makespan <= self.bound * (1 + _CLOSE))

    def value(self, found: Found) -> float:
        """What is to be small: time, and a little also memory."""
        return found.makespan * (1 + 2 * _MEMORY * found.live / (4 * self.task.placement.num_layers))

    def spend(self, orders: Orders, times: int = 1) -> None:
        """Count simulated runs of ``orders``."""
        self._effort -= times * len(orders)

    def consider(self, orders: Orders, made_by: dict[str, object]) -> Found | None:
        """Simulate an order on the real groups, keep it if it is the best; None where it breaks the cap."""
        task = self.task
        live = most_live(orders, redispatch=task.redispatch)
        if task.max_live is not None and live > task.max_live:
            return None
        self.spend(orders)
        run = simulate_orders(orders, task.alone)
        makespan = run.makespan
        if task.redispatch and (self.best is None or makespan < self.best.makespan):
            self.spend(orders, 2)
            makespan = dispatched_again(run, task.costs, quick=True).makespan
        found = Found(run, live, made_by, makespan)
        if self.best is None or self.value(found) < self.value(self.best):
            self.best = found
        if self._keep:
            self.runners_up = sorted((*self.runners_up, found), key=self.value)[: self._keep]
        return found

    def shape(self, shape: Shape) -> float:
        """Value of a member of the family; infinite where it cannot run or breaks the cap."""
        task = self.task
        shape = replace(shape, group_size=min(shape.group_size, task.num_micro_batches))
        if shape in self._values:
            return self._values[shape]
        self._values[shape] = math.inf
        real = None
        for make in self._makers(shape):
            with contextlib.suppress(ValueError):  # its groups wait for each other in a circle
                real = self._real(make, shape)
                break
        found = self.consider(real, {"ring": shape.ring, **_numbers(shape)}) if real is not None else None
        if found is not None:
            self._values[shape] = self.value(found)
        return self._values[shape]

    def _makers(self, shape: Shape) -> tuple[Callable[..., Orders], ...]:
        """How to make a member of the family, what is likely to run first."""
        if self.task.placement.num_layers % shape.ring == 0:
            return (interleaved,)
        # small groups, as a cap makes them, wait in a circle unless padded
        return (interleaved, padded) if self.task.max_live is None else (padded, interleaved)

    def _real(self, make: Callable[..., Orders], shape: Shape) -> Orders | None:
        """A member of the family on the real groups; None where it breaks the cap, or is hopeless.

        Raises:
            ValueError: where it cannot run.
        """
        task = self.task
        orders = make(
            shape,
            num_layers=task.placement.num_layers,
            num_micro_batches=task.num_micro_batches,
            forward_only=task.forward_only,
        )
        if self._breaks_cap(orders):
            return None
        if task.split:
            self.spend(orders, 3)
            return filled(
                orders, task.alone, placement=task.placement, max_live=task.max_live, redispatch=task.redispatch
            )
        self.spend(orders)
        virtual = simulate_orders(orders, task.alone)
        if self.best is not None and virtual.makespan > _HOPELESS * self.best.run.makespan:
            return None
        return folded(virtual, task.placement)

    def _breaks_cap(self, orders: Orders) -> bool:
        """Whether an order on virtual groups is seen to break the cap without a run: real groups have the same work."""
        placement, cap = self.task.placement, self.task.max_live
        if cap is None or placement.ffn != orders.placement.ffn:
            return False
        return placement.attention[:-1] == orders.placement.attention[:-1] and (
            most_live(orders, redispatch=self.task.redispatch) > cap
        )

    def descend(self, shape: Shape, moves: Callable[[Shape], Iterator[list[Shape]]]) -> Shape:
        """From ``shape`` along one coordinate after the other, until none helps or the effort is spent."""
        value = self.shape(shape)
        improved = True
        while improved:
            improved = False
            for line in moves(shape):
                for other in line:
                    if self.is_spent:
                        return shape
                    if self.shape(other) < value:
                        shape, value, improved = other, self.shape(other), True
        return shape

    def justify(self, found: Found, *, passes: int) -> None:
        """Push all work of an order as late as it can go, then list by those times; repeat.

        What is not urgent makes room for what is. Known from project scheduling as forward-backward improvement.
        """
        listing = Listing(found.orders, self.task.alone, redispatch=self.task.redispatch)
        priority: Floats = found.run.start
        for count in range(passes):
            if self.is_over:
                return
            self.spend(found.orders)
            forward = listing.forward(priority, max_live=self.task.max_live)
            self.consider(listing.in_turn(forward), {**found.made_by, "justified": count})
            if count == passes - 1:
                return
            self.spend(found.orders)
            backward = listing.backward(-forward.end)
            priority = backward.makespan - backward.end


def _numbers(shape: Shape) -> dict[str, object]:
    return {
        "group_size": shape.group_size,
        "slope": shape.slope,
        "extra": shape.extra,
        "block": shape.block,
    }


def rings(task: Task) -> list[int]:
    """Numbers of virtual groups to try, the most promising first."""
    p, q = task.placement.num_attention_groups, task.placement.num_ffn_groups
    if p == q:
        return [p]
    common = math.lcm(p, q)
    rings = [max(p, q), min(p, q)]
    if common not in rings:
        rings.insert(0, common)
    return sorted(rings, key=lambda ring: 4 * ring > task.num_micro_batches)


def one_by_one(search: Search) -> Found:
    """One micro-batch at a time: within every cap that can be kept."""
    task = search.task
    schedule = sequential(task.placement, num_micro_batches=task.num_micro_batches, forward_only=task.forward_only)
    orders = Orders.of(schedule)
    found = search.consider(split_at_once(orders) if task.split else orders, {})
    assert found is not None, "one micro-batch at a time keeps within every cap that can be kept"
    return found


def least_live(placement: Placement, *, forward_only: bool = False) -> int:
    """The least cap that an order can meet: when a micro-batch reaches the tail, all its stages are alive."""
    return 1 if forward_only else int(np.bincount(group_of_stage(placement)).max())
