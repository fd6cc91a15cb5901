"""Where a search begins and in which directions it looks."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

from megatron_disagmoe.builders.capped import within_cap
from megatron_disagmoe.builders.gapped import improved
from megatron_disagmoe.builders.interleaved import Shape
from megatron_disagmoe.builders.redispatch import dispatched_again
from megatron_disagmoe.builders.search import (
    LARGE,
    Found,
    Search,
    Task,
    least_live,
    most_live,
    one_by_one,
    rings,
)
from megatron_disagmoe.schedules.actions import Placement
from megatron_disagmoe.simulator.simulate import Run

_SLOPES = (1.0, 1.5, 2.0, 3.0, 4.0, 5.0)
_EXTRAS = (0, 1, 2, 3, 4, 6, 8)
#: Slope, extra and block to begin with; the first is the best where transfers take no longer than stages.
_STARTS = ((2.0, 3, 1), (4.0, 3, 2), (1.0, 2, 1), (3.0, 4, 1), (5.0, 3, 1))
_JUSTIFIED = 3
#: Makespans this close are alike, and fewer live activations decide.
_ALIKE = 1e-3
#: Orders that are improved with their messages, and passes forward of each at most.
_IMPROVED, _PASSES = 8, 4


def best_order(task: Task, *, group_size: int | None = None) -> Found:
    """The best order found for ``task``; ``group_size`` fixes G.

    Without a cap, and where that is not much slower, one that keeps no more alive than a balanced ring would.
    """
    found = _search(task, group_size)
    if task.redispatch:
        found = _or_without_counting(task, found, group_size)
    lean = max(4 * task.placement.num_layers + 4 * max(rings(task)), least_live(task.placement))
    if task.max_live is not None or task.forward_only or found.live <= lean or len(found.orders) > LARGE:
        return found
    leaner = _search(replace(task, max_live=lean), group_size)
    return leaner if leaner.makespan <= found.makespan * (1 + _ALIKE) else found


def _or_without_counting(task: Task, found: Found, group_size: int | None) -> Found:
    """The better of ``found`` and of the best order that is searched for as if nothing were dispatched again.

    Second dispatches shake a search: with them one order is often better than another by chance.
    """
    other = _search(replace(task, redispatch=False, costs=task.alone), group_size)
    both = [replace(each, makespan=dispatched_again(each.run, task.costs).makespan) for each in (found, other)]
    return min(both, key=lambda each: each.makespan)


def _search(task: Task, group_size: int | None) -> Found:
    search = Search(task)
    _try_all(search, group_size)
    return search.best or one_by_one(search)


def best_timetable(
    task: Task, *, group_size: int | None = None
) -> tuple[Found, tuple[Run, dict[str, object]] | None]:
    """``best_order``; and the best run found in which ports wait for the message whose turn it is, and how it was made.

    The best orders of the same search, each improved together with its messages; None where that is about as slow.
    """
    search = Search(task, keep=_IMPROVED)
    _try_all(search, group_size)
    capped = task.max_live is not None
    found = search.best or one_by_one(search) if capped else best_order(task, group_size=group_size)
    makespan = found.makespan * (1 - _ALIKE)
    best: tuple[Run, dict[str, object]] | None = None
    for start in search.runners_up[: 1 if len(found.orders) > LARGE else None]:
        if makespan <= search.bound:
            break
        begun = dispatched_again(start.run, task.costs) if task.redispatch else start.run
        for run in improved(begun, task.costs, passes=_PASSES, max_live=task.max_live):
            live = most_live(run.orders, redispatch=task.redispatch)
            fits = task.max_live is None or live <= task.max_live
            if fits and run.makespan < makespan:
                makespan, best = run.makespan, (run, start.made_by)
    return found, best


def _try_all(search: Search, group_size: int | None) -> None:
    task = search.task
    if task.max_live is not None and not task.forward_only and within_cap(search, group_size=group_size):
        return
    is_even = _is_even(task.placement)
    for number, (slope, extra, block) in enumerate(_STARTS):
        for ring in rings(task):
            if not search.is_over:
                size = min(task.num_micro_batches, group_size or max(4 * ring, _around(task, ring)))
                start = Shape(ring, size, slope, extra, block)
                search.descend(start, lambda shape: _moves(task, shape, group_size))
        if task.forward_only:
            break
        if search.best is not None and number == (len(_STARTS) - 1 if is_even else 0):
            search.justify(search.best, passes=_JUSTIFIED)


def _is_even(placement: Placement) -> bool:
    """Whether the layers go round equally many groups of both sides, as the interleaved family has it."""
    p = placement.num_attention_groups
    return p == placement.num_ffn_groups and placement == Placement.round_robin(
        num_layers=max(placement.num_layers, p), num_attention_groups=p, num_ffn_groups=p
    )


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
