"""Interleaved 1F1B over the ring A_0, F_0, A_1, F_1, ... of q attention and q FFN groups.

Micro-batches go round in groups of G: a worker runs the first G on its first stage, the same G on its second, and so
on; backward the same from the last stage down. After its warm-up a worker alternates m backwards and m forwards.

What the numbers are good for. A micro-batch comes back to a worker after 2q stages and 2q transfers; G micro-batches
keep the worker busy meanwhile. From one worker to the next and back takes one forward, one backward and two transfers;
in that time the worker that is nearer to the start does ``slope`` forwards more before its first backward.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

from megatron_disagmoe.schedules.actions import Placement
from megatron_disagmoe.schedules.orders import B, F, Ints, Orders, group_of_stage, sorted_orders


@dataclass(frozen=True)
class Shape:
    """One order of the family.

    Attributes:
        ring: q, attention groups, and FFN groups, that share the layers round-robin; more than L leaves some empty.
        group_size: G at most; groups are made even.
        slope: forwards that the warm-up shrinks by from one worker to the next.
        extra: forwards of every warm-up beyond those that the first backward needs.
        block: m.
    """

    ring: int
    group_size: int
    slope: float = 2.0
    extra: int = 0
    block: int = 1


def even_groups(num_micro_batches: int, largest: int) -> list[int]:
    """Sizes of the fewest groups of at most ``largest`` micro-batches, as even as can be, larger ones first."""
    count = math.ceil(num_micro_batches / largest)
    small, rest = divmod(num_micro_batches, count)
    return [small + 1] * rest + [small] * (count - rest)


def interleaved(shape: Shape, *, num_layers: int, num_micro_batches: int, forward_only: bool = False) -> Orders:
    """The order on ``shape.ring`` attention and FFN groups, and one more attention group that holds only the tail."""
    placement = Placement(
        num_attention_groups=shape.ring + 1,
        num_ffn_groups=shape.ring,
        attention=(*(layer % shape.ring for layer in range(num_layers)), shape.ring),
        ffn=tuple(layer % shape.ring for layer in range(num_layers)),
    )
    last = 2 * num_layers
    sizes = even_groups(num_micro_batches, shape.group_size)
    stage = np.repeat(np.arange(last + 1), num_micro_batches)
    micro_batch = np.tile(np.arange(num_micro_batches), last + 1)
    group = np.repeat(np.arange(len(sizes)), sizes)[micro_batch]
    worker = group_of_stage(placement)[stage]
    forward = _rank(worker, group, stage, micro_batch)
    if forward_only:
        return sorted_orders(
            placement,
            num_micro_batches=num_micro_batches,
            forward_only=True,
            kind=np.full(len(stage), F),
            stage=stage,
            micro_batch=micro_batch,
            keys=(forward,),
        )
    backward = _rank(worker, group, -stage, micro_batch)
    warm_up = _warm_up(placement, sizes[0], shape)[worker]
    block = np.where(stage == last, 1, shape.block)  # the tail has each backward follow its forward
    cycle = 2 * block
    late = forward - warm_up
    forward_key = np.where(late < 0, forward, warm_up + cycle * (late // block) + block + late % block)
    backward_key = warm_up + cycle * (backward // block) + backward % block
    return sorted_orders(
        placement,
        num_micro_batches=num_micro_batches,
        forward_only=False,
        kind=np.repeat((F, B), len(stage)),
        stage=np.tile(stage, 2),
        micro_batch=np.tile(micro_batch, 2),
        keys=(np.concatenate((forward_key, backward_key)),),
    )


def padded(shape: Shape, *, num_layers: int, num_micro_batches: int, forward_only: bool = False) -> Orders:
    """The order for the next larger number of layers that the ring divides, without the actions of those beyond.

    Where some workers have a layer fewer, warm-ups of their own make small groups wait for each other in a circle: a
    worker's lag is then another share of its round than its neighbours'. Leaving actions out of an order that runs
    closes no circle, as what waited for them waits for what they waited for.
    """
    even = interleaved(
        shape,
        num_layers=math.ceil(num_layers / shape.ring) * shape.ring,
        num_micro_batches=num_micro_batches,
        forward_only=forward_only,
    )
    tail = 2 * even.placement.num_layers
    there = np.flatnonzero((even.stage < 2 * num_layers) | (even.stage == tail))
    placement = even.placement
    return sorted_orders(
        replace(placement, attention=(*placement.attention[:num_layers], shape.ring), ffn=placement.ffn[:num_layers]),
        num_micro_batches=num_micro_batches,
        forward_only=forward_only,
        kind=even.kind[there],
        stage=np.minimum(even.stage[there], 2 * num_layers),
        micro_batch=even.micro_batch[there],
        keys=(there,),
    )


def _rank(worker: Ints, *keys: Ints) -> Ints:
    """Position of every action among those of its worker, by ``keys``."""
    order = np.lexsort((*reversed(keys), worker))
    counts = np.bincount(worker)
    rank = np.empty(len(worker), np.int64)
    rank[order] = np.arange(len(worker)) - np.repeat(np.cumsum(counts) - counts, counts)
    return rank


def _warm_up(placement: Placement, group_size: int, shape: Shape) -> Ints:
    """Forwards of every worker before its first backward."""
    groups = group_of_stage(placement)
    last = 2 * placement.num_layers
    stages = np.bincount(groups, minlength=len(placement.groups))
    deepest = np.zeros(len(placement.groups), np.int64)
    np.maximum.at(deepest, groups, np.arange(last + 1))
    ahead = np.floor(shape.slope * (last - 1 - deepest)).astype(np.int64)
    warm_up = np.maximum(stages - 1, 0) * group_size + ahead + 1 + shape.extra
    warm_up[groups[last]] = 1
    return warm_up
