"""Split backward: the weight gradients of a group fill the time in which it would wait."""

from __future__ import annotations

import numpy as np

from megatron_disagmoe.builders.folding import progress
from megatron_disagmoe.schedules.orders import B, I, Orders, W, sorted_orders
from megatron_disagmoe.simulator.costs import StageCosts
from megatron_disagmoe.simulator.engine import Tasks, run
from megatron_disagmoe.simulator.simulate import durations, transfers_of


def with_split_backward(orders: Orders, costs: StageCosts) -> Orders:
    """``orders`` with ``I`` in the place of each ``B``, and its ``W`` as soon as the group has nothing else to do.

    ``orders`` must be able to run; ``W`` is never chosen where the next action could start.
    """
    assert not (orders.kind == W).any(), "the backward is whole so far"
    kind = np.where(orders.kind == B, I, orders.kind)
    split = np.flatnonzero(kind == I)
    count, num_groups = len(orders), len(orders.bounds) - 1
    base = Orders(
        placement=orders.placement,
        num_micro_batches=orders.num_micro_batches,
        forward_only=orders.forward_only,
        kind=kind,
        stage=orders.stage,
        micro_batch=orders.micro_batch,
        bounds=orders.bounds,
    )
    group = base.group
    transfers = transfers_of(base, costs)
    stage = np.concatenate((orders.stage, orders.stage[split]))
    weights = np.array(
        [costs.weight_gradient(s, num_layers=orders.placement.num_layers) for s in orders.stage[split].tolist()]
    )
    total = count + len(split)
    number = total + np.arange(len(transfers))
    used = transfers.user >= 0
    chain = np.flatnonzero(group[:-1] == group[1:])
    times = run(
        Tasks(
            duration=np.concatenate((durations(base, costs), weights, transfers.duration)),
            first=np.concatenate((2 * num_groups + group, 2 * num_groups + group[split], transfers.sender)),
            second=np.concatenate((np.full(total, -1), num_groups + transfers.receiver)),
            priority=np.concatenate((np.zeros(count), np.ones(len(split)), np.zeros(len(transfers)))).astype(np.int64),
            before=np.concatenate((chain, split, transfers.maker, number[used])),
            after=np.concatenate((chain + 1, count + np.arange(len(split)), number, transfers.user[used])),
            num_resources=3 * num_groups,
        )
    )
    result = Orders(
        placement=orders.placement,
        num_micro_batches=orders.num_micro_batches,
        forward_only=orders.forward_only,
        kind=np.concatenate((kind, np.full(len(split), W))),
        stage=stage,
        micro_batch=np.concatenate((orders.micro_batch, orders.micro_batch[split])),
        bounds=orders.bounds,
    )
    return sorted_orders(
        orders.placement,
        num_micro_batches=orders.num_micro_batches,
        forward_only=orders.forward_only,
        kind=result.kind,
        stage=result.stage,
        micro_batch=result.micro_batch,
        keys=(times.start[:total], progress(result)),
    )
