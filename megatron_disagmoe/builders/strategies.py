"""Where a search begins and in which directions it looks."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import replace

from megatron_disagmoe.builders.interleaved import Shape
from megatron_disagmoe.builders.paced import paced
from megatron_disagmoe.builders.search import Found, Search, Task
from megatron_disagmoe.builders.sequential import sequential
from megatron_disagmoe.builders.weights import filled, split_at_once
from megatron_disagmoe.schedules.orders import Orders

_SLOPES = (1.0, 1.5, 2.0, 3.0, 4.0, 5.0)
_EXTRAS = (0, 1, 2, 3, 4, 6, 8)
#: Slope, extra and block to begin with; the first is the best where transfers take no longer than stages.
_STARTS = ((2.0, 3, 1), (4.0, 3, 2), (1.0, 2, 1), (3.0, 4, 1), (5.0, 3, 1))
_JUSTIFIED = 3


def best_order(task: Task, *, group_size: int | None = None) -> Found:
    """The best order found for ``task``; ``group_size`` fixes G."""
    search = Search(task)
    if group_size is None:
        _consider_paced(search)
    is_even = task.placement.num_attention_groups == task.placement.num_ffn_groups
    for number, (slope, extra, block) in enumerate(_STARTS):
        for ring in _rings(task):
            if not search.is_over:
                size = min(task.num_micro_batches, group_size or max(4 * ring, _around(task, ring)))
                start = Shape(ring, size, slope, extra, block)
                search.descend(start, lambda shape: _moves(task, shape, group_size))
        if task.forward_only:
            break
        if search.best is not None and number == (len(_STARTS) - 1 if is_even else 0):
            search.justify(search.best, passes=_JUSTIFIED)
    if search.best is None:
        one_by_one = sequential(
            task.placement, num_micro_batches=task.num_micro_batches, forward_only=task.forward_only
        )
        search.consider(Orders.of(one_by_one), {})
    assert search.best is not None, "one micro-batch at a time keeps within every cap that can be kept"
    return search.best


def _consider_paced(search: Search) -> None:
    """Orders for a low cap, where whole groups of micro-batches would be too many at once."""
    task = search.task
    if task.max_live is None or task.forward_only:
        return
    for orders, made_by in paced(task.workload, task.max_live):
        if not task.split:
            search.consider(orders, made_by)
            continue
        search.consider(split_at_once(orders), made_by)
        with contextlib.suppress(ValueError):  # weight gradients that wait need room, and here is little
            search.consider(filled(orders, task.costs, max_live=task.max_live), made_by)


def _rings(task: Task) -> list[int]:
    """Numbers of virtual groups to try, the most promising first."""
    p, q = task.placement.num_attention_groups, task.placement.num_ffn_groups
    if p == q:
        return [p]
    common = math.lcm(p, q)
    rings = [max(p, q), min(p, q)]
    if common not in rings:
        rings.insert(0, common)
    return sorted(rings, key=lambda ring: 4 * ring > task.num_micro_batches)


def _around(task: Task, ring: int) -> int:
    """Micro-batches that a group can take while one goes round the ring."""
    costs = task.costs
    edges = costs.edge(0) + costs.edge(1)
    busiest = max(costs.attention, costs.ffn, edges / 2)
    return math.ceil(ring * (costs.attention + costs.ffn + edges) / busiest)


def _moves(task: Task, shape: Shape, group_size: int | None) -> Iterator[list[Shape]]:
    """Every coordinate's other values, one coordinate after the other."""
    if not task.forward_only:
        yield [replace(shape, slope=slope) for slope in _SLOPES]
        yield [replace(shape, extra=extra) for extra in _EXTRAS]
    if group_size is None:
        yield [replace(shape, group_size=size) for size in _sizes(task, shape)]
    if not task.forward_only:
        yield [replace(shape, block=block) for block in (1, 2)]


def _sizes(task: Task, shape: Shape) -> list[int]:
    """Largest groups to try: those of other numbers of groups, and those of two or three times round the ring."""
    n = task.num_micro_batches
    count = math.ceil(n / shape.group_size)
    around = _around(task, shape.ring)
    sizes = [math.ceil(n / other) for other in (count - 1, count + 1, count - 2, count + 2) if other > 0]
    sizes += [around, around + 1, around + shape.ring, 3 * shape.ring, 2 * shape.ring]
    return list(dict.fromkeys(min(size, n) for size in sizes))
