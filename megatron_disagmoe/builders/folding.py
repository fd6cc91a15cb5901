"""From a run on virtual groups to an order on real ones: groups take their work in order of start."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from megatron_disagmoe.schedules.actions import Placement
from megatron_disagmoe.schedules.orders import F, Ints, Orders, W, sorted_orders
from megatron_disagmoe.simulator.simulate import Run


def progress(orders: Orders) -> Ints:
    """A number of every action that grows along every dependency: forward up the stages, backward down again."""
    last = 2 * orders.placement.num_layers
    forward = 2 * orders.stage
    backward = 2 * (2 * last + 1 - orders.stage) + (orders.kind == W)
    return np.where(orders.kind == F, forward, backward)


def folded(run: Run, placement: Placement) -> Orders:
    """The actions of ``run`` on the groups of ``placement``, in order of their start.

    Free of deadlock: a run is over in finite time, so the order of its starts (ties by ``progress``) is one in which
    everything could run one after the other.
    """
    return reordered(run.orders, placement, run.start, progress(run.orders), run.orders.micro_batch)


def reordered(orders: Orders, placement: Placement, *keys: NDArray[np.generic]) -> Orders:
    """The actions of ``orders`` on the groups of ``placement``, each group's by ``keys``, the first of them first."""
    return sorted_orders(
        placement,
        num_micro_batches=orders.num_micro_batches,
        forward_only=orders.forward_only,
        kind=orders.kind,
        stage=orders.stage,
        micro_batch=orders.micro_batch,
        keys=keys,
    )
