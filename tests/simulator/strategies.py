"""Hypothesis strategies for the simulator: costs, and orders that waste little time."""

from __future__ import annotations

import itertools

import numpy as np
from hypothesis import strategies as st

from megatron_disagmoe.schedules.actions import Placement
from megatron_disagmoe.schedules.orders import B, F, I, Orders, W, sorted_orders
from megatron_disagmoe.simulator.costs import StageCosts
from megatron_disagmoe.simulator.engine import Tasks, run
from megatron_disagmoe.simulator.simulate import durations
from tests.schedules.strategies import placements

#: Few values, so that ties and exact fits are common.
_times = st.sampled_from((0.5, 0.6, 1.0, 1.5, 2.0, 3.0))
_times_or_none = st.just(0.0) | _times
_shares = st.sampled_from((0.0, 0.25, 0.5, 1.0))


@st.composite
def stage_costs(draw: st.DrawFn) -> StageCosts:
    """Any costs, zeros among them."""
    return StageCosts(
        attention=draw(_times),
        ffn=draw(_times),
        transfer=draw(_times_or_none),
        combine=draw(st.none() | _times_or_none),
        lane=draw(_times_or_none),
        backward_ratio=draw(st.sampled_from((0.0, 1.0, 2.0))),
        tail=draw(_times_or_none),
        embedding=draw(_times_or_none),
        weight_fraction=draw(_shares),
        recompute_attention=draw(_shares),
        recompute_ffn=draw(_shares),
    )


@st.composite
def busy_orders(draw: st.DrawFn, costs: StageCosts) -> Orders:
    """Orders from list scheduling with priorities by chance: no group idles while it could compute.

    Transfers are taken as free, so the order is a good one where they are short.
    """
    placement = draw(placements(max_groups=2, max_layers=3))
    n, split = draw(st.integers(1, 6)), draw(st.booleans())
    last = 2 * placement.num_layers
    kinds = (F, I, W) if split else (F, B)
    size = (last + 1) * n
    by_kind = np.array(draw(st.permutations(range(len(kinds) * (last + 1)))))
    stage, micro_batch = np.repeat(np.arange(last + 1), n), np.tile(np.arange(n), last + 1)
    kind = np.repeat(kinds, size)
    orders = sorted_orders(
        placement,
        num_micro_batches=n,
        forward_only=False,
        kind=kind,
        stage=np.tile(stage, len(kinds)),
        micro_batch=np.tile(micro_batch, len(kinds)),
        keys=(np.repeat(by_kind, n),),
    )
    before, after = _dependencies(orders, split=split)
    times = run(
        Tasks(
            duration=durations(orders, costs),
            first=orders.group,
            second=np.full(len(orders), -1),
            priority=np.arange(len(orders)),
            before=before,
            after=after,
            num_resources=len(placement.groups),
        )
    )
    depth = np.where(orders.kind == F, orders.stage, np.where(orders.kind == W, 2 * size, 2 * last + 1 - orders.stage))
    return sorted_orders(
        placement,
        num_micro_batches=n,
        forward_only=False,
        kind=orders.kind,
        stage=orders.stage,
        micro_batch=orders.micro_batch,
        keys=(times.start, times.end, depth),  # what takes no time goes by what it needs
    )


def _dependencies(orders: Orders, *, split: bool) -> tuple[np.ndarray, np.ndarray]:
    n, last = orders.num_micro_batches, 2 * orders.placement.num_layers
    at = {
        (kind, stage, micro_batch): position
        for position, (kind, stage, micro_batch) in enumerate(
            zip(orders.kind.tolist(), orders.stage.tolist(), orders.micro_batch.tolist(), strict=True)
        )
    }
    back = I if split else B
    edges: list[tuple[int, int]] = []
    for micro_batch in range(n):
        path = [at[F, stage, micro_batch] for stage in range(last + 1)]
        path += [at[back, stage, micro_batch] for stage in range(last, -1, -1)]
        edges += itertools.pairwise(path)
        if split:
            edges += [(at[I, stage, micro_batch], at[W, stage, micro_batch]) for stage in range(last + 1)]
    before, after = zip(*edges, strict=True)
    return np.array(before), np.array(after)


def small_placement() -> Placement:
    """Two groups of either side, four layers."""
    return Placement.round_robin(num_layers=4, num_attention_groups=2, num_ffn_groups=2)
