"""Where a search begins and in which directions it looks."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

from megatron_disagmoe.builders.interleaved import Shape
from megatron_disagmoe.builders.search import Found, Search, Task
from megatron_disagmoe.builders.sequential import sequential
from megatron_disagmoe.schedules.orders import Orders

_SLOPES = (1.0, 1.5, 2.0, 3.0, 4.0, 5.0)
_EXTRAS = (0, 1, 2, 3, 4, 6, 8)


def best_order(task: Task, *, group_size: int | None = None) -> Found:
    """The best order found for ``task``; ``group_size`` fixes G."""
    search = Search(task)
    one_by_one = sequential(
        task.placement, num_micro_batches=task.num_micro_batches, forward_only=task.forward_only
    )
    shapes = []
    for ring in _rings(task):
        size = min(task.num_micro_batches, group_size or _trip(task, ring))
        start = Shape(ring, size, slope=2.0, extra=3)
        shapes.append(search.descend(start, lambda shape: _moves(task, shape, group_size)))
    if search.best is None:
        search.consider(Orders.of(one_by_one), {})
    assert search.best is not None, "one micro-batch at a time keeps within every cap that can be kept"
    if not task.forward_only:
        search.justify(search.best, passes=4)
    return search.best


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


def _trip(task: Task, ring: int) -> int:
    """Micro-batches that a group can take while one goes round the ring, and no fewer than four a group."""
    costs = task.costs
    edges = costs.edge(0) + costs.edge(1)
    busiest = max(costs.attention, costs.ffn, edges / 2)
    return max(4 * ring, math.ceil(ring * (costs.attention + costs.ffn + edges) / busiest))


def _moves(task: Task, shape: Shape, group_size: int | None) -> Iterator[list[Shape]]:
    """Every coordinate's other values, one coordinate after the other."""
    if not task.forward_only:
        yield [replace(shape, slope=slope) for slope in _SLOPES]
        yield [replace(shape, extra=extra) for extra in _EXTRAS]
    if group_size is None:
        ring, trip = shape.ring, _trip(task, shape.ring)
        sizes = {2 * ring, 3 * ring, 4 * ring, trip, trip + 1, shape.group_size - 1, shape.group_size + 1}
        sizes.add(task.num_micro_batches if task.num_micro_batches <= 2 * trip else trip)
        yield [replace(shape, group_size=size) for size in sorted(sizes, reverse=True) if size > 0]
    if not task.forward_only:
        yield [replace(shape, block=block) for block in (1, 2)]
