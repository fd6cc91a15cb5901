"""One front for every builder."""

from __future__ import annotations

import dataclasses
import math

import numpy as np

from megatron_disagmoe.builders.folding import folded
from megatron_disagmoe.builders.interleaved import interleaved
from megatron_disagmoe.builders.sequential import sequential
from megatron_disagmoe.builders.weights import with_split_backward
from megatron_disagmoe.schedules.actions import Placement, Schedule
from megatron_disagmoe.schedules.liveness import peak_live
from megatron_disagmoe.schedules.orders import Orders, group_of_stage
from megatron_disagmoe.simulator.costs import StageCosts
from megatron_disagmoe.simulator.simulate import Run, simulate_orders

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
) -> Schedule:
    """A schedule of compute actions; the same arguments give the same schedule everywhere.

    Args:
        kind: one of ``KINDS``.
        costs: what the order is made for; any unit.
        group_size: micro-batches that go round the ring together, G; chosen from ``costs`` where None.
        max_live: cap on the activations alive on any group.

    Raises:
        ValueError: for an unknown kind, sizes below 1, or a cap that no order can meet; it names the least cap.
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
    parameters: dict[str, object] = {
        "kind": kind,
        "max_live": max_live,
        "costs": dataclasses.asdict(costs),
    }
    one_by_one = sequential(placement, num_micro_batches=num_micro_batches, forward_only=forward_only)
    if kind == "sequential":
        return dataclasses.replace(one_by_one, parameters=parameters)
    best: tuple[Schedule, float] | None = None
    for size in _group_sizes(placement, num_micro_batches, costs, group_size):
        try:
            run = _interleaved_run(placement, num_micro_batches, costs, size, forward_only=forward_only)
        except ValueError:  # in such small groups its orders wait for each other in a circle
            continue
        if kind == "split-backward" and not forward_only:
            run = simulate_orders(with_split_backward(run.orders, costs), costs)
        schedule = run.orders.schedule({**parameters, "group_size": size})
        if max_live is not None and max(peak_live(schedule).values()) > max_live:
            continue
        if best is None or run.makespan < best[1]:
            best = schedule, run.makespan
    return best[0] if best else dataclasses.replace(one_by_one, parameters=parameters)


def least_live(placement: Placement, *, forward_only: bool = False) -> int:
    """The least cap that an order can meet: when a micro-batch reaches the tail, all its stages are alive."""
    return 1 if forward_only else int(np.bincount(group_of_stage(placement)).max())


def _group_sizes(placement: Placement, n: int, costs: StageCosts, asked: int | None) -> list[int]:
    """Group sizes to try: one trip round the ring, and smaller ones for less memory."""
    if asked is not None:
        return [min(asked, n)]
    p = max(placement.num_attention_groups, placement.num_ffn_groups)
    trip = round_trip(p, costs)
    return sorted({max(1, min(n, size)) for size in (4 * p, math.ceil(trip), 3 * p, 2 * p, p, 1)}, reverse=True)


def round_trip(p: int, costs: StageCosts) -> float:
    """Micro-batches that a group can take while one goes round a ring of p attention and p FFN groups."""
    edges = costs.edge(0) + costs.edge(1)
    return p * (costs.attention + costs.ffn + edges) / max(costs.attention, costs.ffn, edges / 2)


def _interleaved_run(placement: Placement, n: int, costs: StageCosts, size: int, *, forward_only: bool) -> Run:
    ring = math.lcm(placement.num_attention_groups, placement.num_ffn_groups)
    virtual: Orders = interleaved(
        num_layers=placement.num_layers, ring=ring, num_micro_batches=n, group_size=size, forward_only=forward_only
    )
    return simulate_orders(folded(simulate_orders(virtual, costs), placement), costs)
