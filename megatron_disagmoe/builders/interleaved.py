"""Interleaved 1F1B over the ring A_0, F_0, A_1, F_1, ... of q attention and q FFN groups.

Micro-batches go round in groups of G: a worker runs the first G on its first stage, the same G on its second, and so
on; backward the same from the last stage down. After ``warm_up`` forwards it alternates one backward and one forward.
In this order a stage's successor is one worker further and takes the micro-batch up as soon as it arrives, if G is what
one trip round the ring takes: 2q stages and 2q transfers.
"""

from __future__ import annotations

import math

import numpy as np

from megatron_disagmoe.schedules.actions import Placement
from megatron_disagmoe.schedules.orders import B, F, Ints, Orders, group_of_stage, sorted_orders


def even_groups(num_micro_batches: int, largest: int) -> list[int]:
    """Sizes of the fewest groups of at most ``largest`` micro-batches, as even as can be, larger ones first."""
    count = math.ceil(num_micro_batches / largest)
    small, rest = divmod(num_micro_batches, count)
    return [small + 1] * rest + [small] * (count - rest)


def interleaved(
    *,
    num_layers: int,
    ring: int,
    num_micro_batches: int,
    group_size: int,
    warm_up_extra: int = 0,
    forward_only: bool = False,
) -> Orders:
    """The order on ``ring`` attention and FFN groups, and one more attention group that holds only the tail.

    Args:
        ring: attention groups, and FFN groups, that share the L layers round-robin; more than L leaves some empty.
        group_size: G at most; groups are made even.
        warm_up_extra: forwards before the first backward beyond the stages still ahead, there and back.
    """
    placement = Placement(
        num_attention_groups=ring + 1,
        num_ffn_groups=ring,
        attention=(*(layer % ring for layer in range(num_layers)), ring),
        ffn=tuple(layer % ring for layer in range(num_layers)),
    )
    last = 2 * num_layers
    sizes = even_groups(num_micro_batches, group_size)
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
    warm_up = _warm_up(placement, sizes[0], warm_up_extra)[worker]
    return sorted_orders(
        placement,
        num_micro_batches=num_micro_batches,
        forward_only=False,
        kind=np.repeat((F, B), len(stage)),
        stage=np.tile(stage, 2),
        micro_batch=np.tile(micro_batch, 2),
        keys=(np.concatenate((2 * forward, 2 * (warm_up + backward) - 1)),),
    )


def _rank(worker: Ints, *keys: Ints) -> Ints:
    """Position of every action among those of its worker, by ``keys``."""
    order = np.lexsort((*reversed(keys), worker))
    counts = np.bincount(worker)
    rank = np.empty(len(worker), np.int64)
    rank[order] = np.arange(len(worker)) - np.repeat(np.cumsum(counts) - counts, counts)
    return rank


def _warm_up(placement: Placement, group_size: int, extra: int) -> Ints:
    """Forwards of every worker before its first backward."""
    groups = group_of_stage(placement)
    last = 2 * placement.num_layers
    stages = np.bincount(groups, minlength=len(placement.groups))
    deepest = np.zeros(len(placement.groups), np.int64)
    np.maximum.at(deepest, groups, np.arange(last + 1))
    warm_up = np.maximum(stages - 1, 0) * group_size + 2 * (last - 1 - deepest) + 1 + extra
    warm_up[groups[last]] = 1
    return warm_up
