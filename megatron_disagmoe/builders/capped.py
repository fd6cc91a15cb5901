"""The best order within a cap on live activations: four families, each the best of some range of caps and sizes.

Interleaved orders with smaller groups come nearest to the bound from where it is flat down to about half of that;
circular timetables (``paced``) below; and where the cap and not the work sets the pace, micro-batches that hardly wait
(``packed``). Small instances are also built action by action (``beam``).
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator
from dataclasses import replace

from megatron_disagmoe.builders.beam import beamed
from megatron_disagmoe.builders.interleaved import Shape
from megatron_disagmoe.builders.paced import paced
from megatron_disagmoe.builders.packed import packed
from megatron_disagmoe.builders.search import LARGE, Search, Task, rings
from megatron_disagmoe.builders.timetable import steps_of
from megatron_disagmoe.builders.weights import filled, split_at_once
from megatron_disagmoe.schedules.orders import Orders
from megatron_disagmoe.simulator.live_bound import hills
from megatron_disagmoe.simulator.workload import Paths

_SLOPES = (2.0, 1.5, 1.0)
_EXTRAS = (1, 0, 2, 3)
#: The pace that the cap allows over the pace that the work allows: below the first only interleaved orders are tried,
#: above the second no longer; from the third on micro-batches that hardly wait.
_ONLY_SHAPES, _NO_SHAPES, _PACKED = 0.55, 1.25, 0.9
#: What a group that is a micro-batch smaller may lose before still smaller ones are given up.
_WORSE = 1.1


def within_cap(search: Search, *, group_size: int | None = None) -> bool:
    """Try all that suits the cap of ``search.task``; False where the cap is so wide that other orders may be better.

    ``group_size`` fixes G and leaves only the first family.
    """
    task = search.task
    assert task.max_live is not None, "there is a cap"
    pressure = _pressure(task, task.max_live)
    if pressure < _NO_SHAPES or group_size is not None:
        _shapes(search, group_size)
    if group_size is None and not search.is_over:
        _consider(search, beamed(task.workload, task.max_live))
    if group_size is None and pressure > _ONLY_SHAPES:
        _consider(search, paced(task.workload, task.max_live))
        if pressure > _PACKED:
            _consider(search, packed(task.workload, task.max_live))
        if search.best is not None:
            search.justify(search.best, passes=3 if len(search.best.orders) <= LARGE else 1)
    return pressure > _ONLY_SHAPES


def _pressure(task: Task, max_live: int) -> float:
    """Time between two micro-batches that the cap allows, were they never to wait, over that which the work allows."""
    paths = Paths(task.workload)
    steps = steps_of(paths)
    lives = max((float(hill.rise.sum() + hill.fall.sum()) for hill in hills(paths)), default=0.0)
    return lives * steps.scale / max_live / steps.work


def _consider(search: Search, made: Iterable[tuple[Orders, dict[str, object]]]) -> None:
    """Orders with whole backwards, split in two ways where the task says so."""
    task = search.task
    if search.is_spent:
        return
    for orders, made_by in made:
        if not task.split:
            search.consider(orders, made_by)
        else:
            search.consider(split_at_once(orders), made_by)
            with contextlib.suppress(ValueError):  # weight gradients that wait need room, and here is little
                search.consider(filled(orders, task.alone, max_live=task.max_live, redispatch=task.redispatch), made_by)
        if search.is_over:
            return


def _shapes(search: Search, group_size: int | None) -> None:
    """Members of the interleaved family, from groups as large as the cap allows on downwards."""
    task = search.task
    for ring in rings(task):
        best: tuple[float, Shape] | None = None
        for size in [group_size] if group_size else range(_largest(task, ring), 0, -1):
            shapes = [Shape(ring, size, slope, extra=1) for slope in _SLOPES]
            value, shape = min(((search.shape(shape), shape) for shape in shapes), key=lambda one: one[0])
            if search.is_over or (best is not None and value > _WORSE * best[0]):
                break
            if value < (best[0] if best else math.inf):
                best = value, shape
        if best is not None:
            search.descend(best[1], lambda shape: _around(shape, group_size))


def _largest(task: Task, ring: int) -> int:
    """The largest groups that may keep within the cap: sizes that cannot cost a run each, and all the effort at last.

    A worker of the ring holds (v - 1) G and more, with v stages; a real group has those of several workers.
    """
    assert task.max_live is not None, "there is a cap"
    p = min(task.placement.num_attention_groups, task.placement.num_ffn_groups)
    workers, stages = max(1, ring // p), -(-task.placement.num_layers // ring)
    way = _SLOPES[-1] * (2 * ring - 1 if workers == 1 else 0)
    room = task.max_live - workers * way - 1
    return max(1, min(task.num_micro_batches, math.floor(room / (workers * max(stages - 1, 1)))))


def _around(shape: Shape, group_size: int | None) -> Iterator[list[Shape]]:
    yield [replace(shape, extra=extra) for extra in _EXTRAS]
    yield [replace(shape, slope=slope) for slope in (shape.slope + 0.25, shape.slope - 0.25) if slope > 0]
    if group_size is None:
        sizes = (shape.group_size + 1, shape.group_size - 1)
        yield [replace(shape, group_size=size, extra=0) for size in sizes if size > 0]
