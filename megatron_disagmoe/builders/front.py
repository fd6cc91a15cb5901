"""One front for every builder."""

from __future__ import annotations

import dataclasses
import json

from megatron_disagmoe.builders.listed import listed
from megatron_disagmoe.builders.redispatch import redispatching
from megatron_disagmoe.builders.search import Task, least_live
from megatron_disagmoe.builders.sequential import sequential
from megatron_disagmoe.builders.strategies import best_order, best_timetable
from megatron_disagmoe.schedules.actions import Placement, Schedule
from megatron_disagmoe.schedules.orders import in_micro_batch_order
from megatron_disagmoe.simulator.costs import StageCosts

KINDS = ("interleaved-1f1b", "split-backward", "sequential")

#: For a run without measured times: stages alike, a transfer as long as a stage.
NOMINAL_COSTS = StageCosts(attention=1.0, ffn=1.0, transfer=1.0)


def build(
    kind: str,
    placement: Placement,
    *,
    num_micro_batches: int,
    costs: StageCosts,
    group_size: int | None = None,
    max_live: int | None = None,
    forward_only: bool = False,
    redispatch: bool = False,
    order_messages: bool = False,
) -> Schedule:
    """A schedule of compute actions; the same arguments give the same schedule everywhere.

    Args:
        kind: one of ``KINDS``.
        costs: what the order is made for; any unit.
        group_size: micro-batches that go round the ring together, G; chosen from ``costs`` where None.
        max_live: cap on the activations alive on any group.
        redispatch: dispatch every FFN stage's tokens once more before its backward. The order is the best with that.
        order_messages: where that makes the step shorter, also say in which order ports serve messages. The schedule
            then holds its transfers. Lanes that take time are served as they come.

    Raises:
        ValueError: for an unknown kind, sizes below 1, or a cap that no order can meet; it names the least cap. For an
            order of messages that is asked for where transfers take no time.
    """
    if kind not in KINDS:
        raise ValueError(f"there is no schedule {kind!r}; choose among {', '.join(KINDS)}")
    for name, value in (("num_micro_batches", num_micro_batches), ("group_size", group_size), ("max_live", max_live)):
        if value is not None and value < 1:
            raise ValueError(f"{name} is {value}; it must be at least 1")
    least = least_live(placement, forward_only=forward_only)
    if max_live is not None and max_live < least:
        raise ValueError(
            f"no order keeps within {max_live} live activations on every group: one micro-batch alone needs {least}; "
            f"allow at least {least}, or spread the layers over more groups"
        )
    if order_messages:
        _check_order_messages(costs)
    parameters: dict[str, object] = {
        "kind": kind,
        "max_live": max_live,
        "costs": json.loads(json.dumps(dataclasses.asdict(costs))),  # as a schedule file gives it back
    }
    if redispatch:
        parameters["redispatch"] = True
    if kind == "sequential":
        order = sequential(placement, num_micro_batches=num_micro_batches, forward_only=forward_only)
        order = dataclasses.replace(order, parameters=parameters)
        return redispatching(order, costs) if redispatch else order
    task = Task(
        placement=placement,
        num_micro_batches=num_micro_batches,
        costs=costs,
        forward_only=forward_only,
        split=kind == "split-backward" and not forward_only,
        max_live=max_live,
        redispatch=redispatch and not forward_only,
    )
    if order_messages:
        found, timetable = best_timetable(task, group_size=group_size)
        if timetable is not None:
            run, made_by = timetable
            return listed(run, {**parameters, **made_by, "order_messages": True})
    else:
        found = best_order(task, group_size=group_size)
    schedule = in_micro_batch_order(found.orders).schedule({**parameters, **found.made_by})
    return redispatching(schedule, costs) if task.redispatch else schedule


def _check_order_messages(costs: StageCosts) -> None:
    if min(costs.edge(0), costs.edge(1)) <= 0:
        raise ValueError(
            "--order-messages puts no messages in order where transfers take no time; their order does not matter then"
        )
