"""Schedules for shapes of AF-pipe: the builders' own search where it can afford one, a few of its orders where not.

A search of the builders may simulate 1.5 million actions; at 94 layers and hundreds of micro-batches that is a handful
of orders. There the members of the interleaved family that suit the cap best are tried directly, and no more.
"""

from __future__ import annotations

from megatron_disagmoe import builders
from megatron_disagmoe.builders.interleaved import Shape as Order
from megatron_disagmoe.builders.redispatch import redispatching
from megatron_disagmoe.builders.search import Search, Task
from megatron_disagmoe.reproduction.systems.af_paper import Evaluated
from megatron_disagmoe.schedules.actions import Schedule
from megatron_disagmoe.schedules.orders import in_micro_batch_order

#: Forward and backward actions up to which the builders search.
_SEARCHED = 16_000
_SLOPES, _EXTRAS = (2.0, 3.0, 4.0), (1, 3)


def build(evaluated: Evaluated) -> Schedule | None:
    """The schedule under the cap that memory leaves; None where none fits."""
    if evaluated.most_live < builders.least_live(evaluated.placement):
        return None
    schedule = _direct(evaluated)
    actions = 4 * evaluated.model.num_moe_layers * evaluated.micro_batches
    if schedule is None or actions <= _SEARCHED:
        schedule = builders.build(
            evaluated.shape.kind,
            evaluated.placement,
            num_micro_batches=evaluated.micro_batches,
            costs=evaluated.costs,
            max_live=_cap(evaluated),
        )
    return redispatching(schedule, evaluated.costs) if evaluated.shape.ffn_lever[1] else schedule


def _cap(evaluated: Evaluated) -> int | None:
    cap = evaluated.most_live
    return None if cap >= (evaluated.layers_of_group + 1) * evaluated.micro_batches else cap


def _direct(evaluated: Evaluated) -> Schedule | None:
    """The best of the orders whose groups the cap allows, from the largest useful ones on."""
    p, v, n = evaluated.shape.groups, evaluated.layers_of_group, evaluated.micro_batches
    task = Task(
        placement=evaluated.placement,
        num_micro_batches=n,
        costs=evaluated.costs,
        forward_only=False,
        split=evaluated.shape.kind == "split-backward",
        max_live=_cap(evaluated),
    )
    actions = 4 * evaluated.model.num_moe_layers * n
    search = Search(task, effort=100 * actions)
    allowed = n if task.max_live is None else (task.max_live - 4 * p - 2) // max(v - 1, 1)
    sizes = dict.fromkeys(min(size, allowed, n) for size in (6 * p, 4 * p, 3 * p, 2 * p))
    for size in (size for size in sizes if size >= 1):
        for slope in _SLOPES:
            for extra in _EXTRAS:
                if not search.is_over:
                    search.shape(Order(p, size, slope, extra))
    if search.best is None:
        return None
    made_by: dict[str, object] = {"kind": evaluated.shape.kind, "max_live": task.max_live, **search.best.made_by}
    return in_micro_batch_order(search.best.orders).schedule(made_by)
