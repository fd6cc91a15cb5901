"""From a simulated run on virtual groups to an order on real ones: groups take work in order of start."""

from __future__ import annotations

import numpy as np

from megatron_disagmoe.schedules.actions import Placement
from megatron_disagmoe.schedules.orders import F, Ints, Orders, W, sorted_orders
from megatron_disagmoe.simulator.simulate import Run


def progress(orders: Orders) -> Ints:
    """A number of every action that grows along every dependency: forward up the stages, backward down again."""
    last = 2 * orders.placement.num_layers
    forward = 3 * orders.stage
    backward = 3 * (2 * last + 1 - orders.stage)
    return np.where(orders.kind == F, forward, backward + (orders.kind == W))


def folded(run: Run, placement: Placement) -> Orders:
    """The actions of ``run`` on the groups of ``placement``, in order of their start.

    Free of deadlock: a run is over in finite time, so the order of its starts (ties by ``progress``) is one in which
    everything could run one after the other.
    """
    orders = run.orders
    return sorted_orders(
        placement,
        num_micro_batches=orders.num_micro_batches,
        forward_only=orders.forward_only,
        kind=orders.kind,
        stage=orders.stage,
        micro_batch=orders.micro_batch,
        keys=(run.start, progress(orders), orders.micro_batch),
    )
