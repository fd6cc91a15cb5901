"""Schedules for shapes of AF-pipe: the builders' own search where it can afford one, a short one where not.

A search of the builders may simulate 1.5 million actions; at 94 layers and hundreds of micro-batches that is a handful
of orders. There members of the interleaved family are tried directly, from those on whose groups of micro-batches the
cap leaves room for, along size, slope and warm-up one after the other. They are judged with their second dispatches.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

from megatron_disagmoe import builders
from megatron_disagmoe.builders.interleaved import Shape as Order
from megatron_disagmoe.builders.redispatch import redispatching
from megatron_disagmoe.builders.search import Search, Task
from megatron_disagmoe.reproduction.systems.af_paper import Evaluated
from megatron_disagmoe.schedules.actions import Schedule
from megatron_disagmoe.schedules.orders import in_micro_batch_order

#: Forward and backward actions up to which the builders search; simulated actions of the short search, in those.
_SEARCHED, _EFFORT = 16_000, 100
_SLOPES, _EXTRAS = (1.0, 1.5, 2.0, 3.0), (0, 1, 3, 6)


def build(evaluated: Evaluated) -> Schedule | None:
    """The schedule under the cap that memory leaves; None where none fits."""
    if evaluated.most_live < builders.least_live(evaluated.placement):
        return None
    schedule = None
    if 4 * evaluated.model.num_moe_layers * evaluated.micro_batches > _SEARCHED:
        schedule = _direct(evaluated)
    return schedule or builders.build(
        evaluated.shape.kind,
        evaluated.placement,
        num_micro_batches=evaluated.micro_batches,
        costs=evaluated.costs,
        max_live=_cap(evaluated),
        redispatch=evaluated.shape.ffn_lever[1],
    )


def _cap(evaluated: Evaluated) -> int | None:
    cap = evaluated.most_live
    most = max(evaluated.layers_of_group + 1, builders.least_live(evaluated.placement))
    return None if cap >= most * evaluated.micro_batches else cap


def _direct(evaluated: Evaluated) -> Schedule | None:
    """The best of a few members of the interleaved family; None where none of them fits."""
    p, n = evaluated.shape.groups, evaluated.micro_batches
    task = Task(
        placement=evaluated.placement,
        num_micro_batches=n,
        costs=evaluated.costs,
        forward_only=False,
        split=evaluated.shape.kind == "split-backward",
        max_live=_cap(evaluated),
        redispatch=evaluated.shape.ffn_lever[1],
    )
    search = Search(task, effort=_EFFORT * 4 * evaluated.model.num_moe_layers * n)
    starts = _widest(evaluated, task)
    if not starts:
        return None
    search.descend(min(starts, key=search.shape), lambda order: _moves(order, p, n))
    if search.best is None:
        return None
    made_by: dict[str, object] = {"kind": evaluated.shape.kind, "max_live": task.max_live, **search.best.made_by}
    schedule = in_micro_batch_order(search.best.orders).schedule(made_by)
    return redispatching(schedule, task.costs) if task.redispatch else schedule


def _widest(evaluated: Evaluated, task: Task) -> list[Order]:
    """For each slope of the warm-up, groups of up to 3p micro-batches, as the cap allows.

    The first attention group begins with (v - 1) G forwards, ``slope`` for each of the groups after it, and one.
    """
    p, v = evaluated.shape.groups, evaluated.layers_of_group
    most = min(3 * p, task.num_micro_batches)
    orders = []
    for slope in (2.0, 1.5, 1.0):
        size = most
        if task.max_live is not None:
            size = min(most, (task.max_live - math.floor(slope * (2 * p - 1)) - 1) // max(v - 1, 1))
        if size > 0:
            orders.append(Order(p, size, slope, 0))
    return orders


def _moves(order: Order, p: int, n: int) -> Iterator[list[Order]]:
    near = (order.group_size - 1, order.group_size + 1, 2 * p, 5 * p // 2, 4 * p)
    sizes = dict.fromkeys(min(size, n) for size in near)
    yield [replace(order, group_size=size) for size in sizes if size > 0]
    yield [replace(order, extra=extra) for extra in _EXTRAS]
    yield [replace(order, slope=slope) for slope in _SLOPES]
