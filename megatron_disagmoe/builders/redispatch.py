"""Dispatching tokens a second time: FFN groups drop a stage's input after forward and get it again before backward."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from megatron_disagmoe.schedules.actions import Schedule
from megatron_disagmoe.schedules.orders import B, D, F, I, Orders, sorted_orders
from megatron_disagmoe.simulator.costs import StageCosts
from megatron_disagmoe.simulator.simulate import Run, simulate_orders

#: How many dispatches before its backward a stage's tokens leave again, beside what their group may be busy with then;
#: the best is taken.
_LEADS = (1.0, 2.0, 4.0)
#: The one that orders are judged by while they are searched for.
_QUICK = (2.0,)


def redispatching(schedule: Schedule, costs: StageCosts) -> Schedule:
    """``schedule`` (compute actions only) with a ``D`` for every FFN stage and micro-batch.

    A ``D`` stands where its group is, in a simulated run, when the tokens have to leave. So everything can happen in
    the order of these times, and nothing waits in a circle.
    """
    if schedule.forward_only:
        return schedule
    alone = simulate_orders(Orders.of(schedule), all_again(costs))
    return dispatched_again(alone, costs).orders.schedule(dict(schedule.parameters))


def dispatched_again(alone: Run, costs: StageCosts, *, quick: bool = False) -> Run:
    """The run of an order with a ``D`` for every FFN stage and micro-batch; ``alone``: its run without (``all_again``).

    ``quick``: one place for them is tried, not the best of several.
    """
    orders = alone.orders
    attention = orders.group < orders.placement.num_attention_groups
    busy = float((alone.end - alone.start)[attention].max(initial=0.0))
    leads: Sequence[float] = _QUICK if quick else _LEADS
    tried = [simulate_orders(_with_lead(alone, busy + lead * costs.transfer), costs) for lead in leads]
    return min(tried, key=lambda run: run.makespan)


def all_again(costs: StageCosts) -> StageCosts:
    """``costs`` of FFN stages that keep nothing and so run all of their forward again, ``D`` or no ``D``."""
    return dataclasses.replace(costs, recompute_ffn=1.0)


def _with_lead(run: Run, lead: float) -> Orders:
    """Every ``D`` stands so long before its backward begins, but not before the stage's own forward has ended."""
    orders, n = run.orders, run.orders.num_micro_batches
    last = 2 * orders.placement.num_layers
    made = np.flatnonzero((orders.kind == F) & (orders.stage % 2 == 0) & (orders.stage < last))
    backward = np.zeros((last + 1) * n)
    again = np.flatnonzero((orders.kind == B) | (orders.kind == I))
    backward[orders.stage[again] * n + orders.micro_batch[again]] = run.start[again]
    needed = backward[(orders.stage[made] + 1) * n + orders.micro_batch[made]]
    return sorted_orders(
        orders.placement,
        num_micro_batches=n,
        forward_only=False,
        kind=np.concatenate((orders.kind, np.full(len(made), D))),
        stage=np.concatenate((orders.stage, orders.stage[made])),
        micro_batch=np.concatenate((orders.micro_batch, orders.micro_batch[made])),
        keys=(
            np.concatenate((run.start, np.maximum(run.end[made], needed - lead))),
            np.concatenate((np.arange(len(orders)), np.full(len(made), -1))),
        ),
    )

