"""Split backward: the weight gradients of a group fill the time in which it would wait."""

from __future__ import annotations

import numpy as np

from megatron_disagmoe.builders.folding import reordered
from megatron_disagmoe.builders.listing import Listing
from megatron_disagmoe.schedules.actions import Placement
from megatron_disagmoe.schedules.orders import B, I, Orders, W, sorted_orders
from megatron_disagmoe.simulator.costs import StageCosts


def filled(
    orders: Orders,
    costs: StageCosts,
    *,
    placement: Placement | None = None,
    max_live: int | None = None,
    redispatch: bool = False,
) -> Orders:
    """``orders`` with ``I`` in the place of each ``B``, and its ``W`` as soon as the group has nothing else to do.

    ``W`` is never chosen where the next ``F`` or ``I`` could start. Any ``W`` of ``orders`` are placed anew.

    Args:
        placement: fold the result onto these groups; those of ``orders`` by default.
        max_live: hold forwards back until enough ``W`` are done.
        redispatch: FFN stages keep nothing from forward to backward.

    Raises:
        ValueError: where ``orders`` cannot run, or not within ``max_live``.
    """
    last = 2 * orders.placement.num_layers
    kept = orders.kind != W
    kind, stage, micro_batch = orders.kind[kept], orders.stage[kept], orders.micro_batch[kept]
    kind = np.where(kind == B, I, kind)
    gradients = kind == I
    position = np.arange(len(kind))
    late = np.full(int(gradients.sum()), len(kind) + last)
    both = sorted_orders(
        orders.placement,
        num_micro_batches=orders.num_micro_batches,
        forward_only=orders.forward_only,
        kind=np.concatenate((kind, np.full(len(late), W))),
        stage=np.concatenate((stage, stage[gradients])),
        micro_batch=np.concatenate((micro_batch, micro_batch[gradients])),
        keys=(np.concatenate((position, late)),),
    )
    group = both.group
    chained = np.zeros(len(both), np.bool_)
    chained[1:] = (group[1:] == group[:-1]) & (both.kind[1:] != W)
    listing = Listing(both, costs, chained=chained, redispatch=redispatch)
    started = listing.forward((both.kind == W).astype(np.float64), max_live=max_live, careful=False)
    if placement is None or placement == orders.placement:
        return listing.in_turn(started)
    return filled(reordered(both, placement, started.turn), costs, max_live=max_live, redispatch=redispatch)


def split_at_once(orders: Orders) -> Orders:
    """``orders`` with ``I`` and at once ``W`` in the place of each ``B``: gradients leave earlier, memory stays."""
    twice = np.repeat(np.arange(len(orders)), np.where(orders.kind == B, 2, 1))
    second = np.concatenate(([False], twice[1:] == twice[:-1]))
    kind = np.where(orders.kind == B, I, orders.kind)[twice]
    return sorted_orders(
        orders.placement,
        num_micro_batches=orders.num_micro_batches,
        forward_only=orders.forward_only,
        kind=np.where(second, W, kind),
        stage=orders.stage[twice],
        micro_batch=orders.micro_batch[twice],
        keys=(np.arange(len(twice)),),
    )
