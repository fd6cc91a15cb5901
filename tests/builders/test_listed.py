"""Timetables of computes and messages: no two things at once, safe as schedules, simulated as they were laid."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_disagmoe import builders
from megatron_disagmoe.builders.gapped import improved
from megatron_disagmoe.builders.listed import listed
from megatron_disagmoe.builders.redispatch import all_again, dispatched_again
from megatron_disagmoe.builders.search import most_live
from megatron_disagmoe.builders.sequential import sequential
from megatron_disagmoe.schedules.actions import Kind, Placement, Schedule
from megatron_disagmoe.schedules.orders import Ints, Orders
from megatron_disagmoe.schedules.verifier import verify
from megatron_disagmoe.simulator.bounds import Workload, lower_bounds
from megatron_disagmoe.simulator.costs import StageCosts
from megatron_disagmoe.simulator.engine import Floats
from megatron_disagmoe.simulator.simulate import Run, simulate, simulate_orders
from tests.schedules.oracle import why_unsafe
from tests.schedules.strategies import placements, runnable_computes

times = st.sampled_from((0.3, 0.5, 1.0, 1.5, 2.5))
zero_or_more = st.just(0.0) | times
costs = st.builds(
    StageCosts,
    attention=times,
    ffn=times,
    transfer=times,
    combine=st.none() | times,
    lane=zero_or_more,
    tail=zero_or_more,
)


def builders_may_make(schedule: Schedule) -> bool:
    """All backwards whole or all split; what is dispatched again, `begun` says."""
    kinds = {action.kind for actions in schedule.actions.values() for action in actions}
    return Kind.D not in kinds and not {Kind.B, Kind.I} <= kinds


def begun(schedule: Schedule, costs: StageCosts, *, again: bool) -> Run:
    """A run of ``schedule``, with a second dispatch of everything where ``again``."""
    orders = Orders.of(schedule)
    if schedule.forward_only or not again:
        return simulate_orders(orders, costs)
    return dispatched_again(simulate_orders(orders, all_again(costs)), costs)


def apart(group: Ints, start: Floats, end: Floats) -> bool:
    """Whether what is on one resource never overlaps."""
    order = np.lexsort((end, start, group))
    same = group[order][1:] == group[order][:-1]
    return bool((start[order][1:] >= end[order][:-1] - 1e-9)[same].all())


def is_sound(run: Run) -> bool:
    """Whether nothing begins before what it needs has ended, and no group or port does two things at once."""
    orders, transfers = run.orders, run.transfers
    used = transfers.user >= 0
    return (
        apart(orders.group, run.start, run.end)
        and apart(transfers.sender, run.transfer_start, run.transfer_end)
        and apart(transfers.receiver, run.transfer_start, run.transfer_end)
        and bool((run.transfer_start >= run.end[transfers.maker] - 1e-9).all())
        and bool((run.start[transfers.user[used]] >= run.transfer_end[used] - 1e-9).all())
    )


@given(runnable_computes().filter(builders_may_make), costs, st.booleans())
@settings(deadline=None, max_examples=200)
def test_timetables_are_sound_and_their_schedules_safe(schedule: Schedule, costs: StageCosts, again: bool) -> None:
    start = begun(schedule, costs, again=again)
    bound = lower_bounds(Workload.of(start.orders, costs)).phase
    for run in improved(start, costs, passes=3):
        assert is_sound(run)
        written = listed(run, {})
        report = verify(written)
        assert report.ok, report.explain()
        assert why_unsafe(written) is None
        makespan = simulate(written, costs).makespan
        assert makespan == pytest.approx(run.makespan)
        assert makespan >= bound - 1e-9


one_by_one = st.builds(sequential, placements(), num_micro_batches=st.integers(2, 5), forward_only=st.just(False))


@given(runnable_computes().filter(builders_may_make) | one_by_one, costs, st.booleans())
@settings(deadline=None, max_examples=150)
def test_places_are_kept(schedule: Schedule, costs: StageCosts, again: bool) -> None:
    """No more alive than before, unless an action without time gets into the middle of another."""
    start = begun(schedule, costs, again=again)
    cap = most_live(start.orders, redispatch=again)
    for run in improved(start, costs, passes=3, max_live=cap):
        assert is_sound(run)
        assert most_live(run.orders, redispatch=again) <= cap or costs.tail == 0
        assert verify(listed(run, {})).ok


NETWORK_BOUND = StageCosts(attention=1, ffn=1, transfer=1.5)
RING = Placement.round_robin(num_layers=8, num_attention_groups=2, num_ffn_groups=2)


def test_messages_are_ordered_within_a_cap() -> None:
    plain, ordered = (
        builders.build(
            "interleaved-1f1b",
            RING,
            num_micro_batches=16,
            costs=NETWORK_BOUND,
            max_live=14,
            order_messages=order,
        )
        for order in (False, True)
    )
    assert ordered.ports_in_order
    assert verify(ordered, max_live=14).ok
    assert simulate(ordered, NETWORK_BOUND).makespan < simulate(plain, NETWORK_BOUND).makespan


def test_the_builder_orders_messages_where_that_is_faster() -> None:
    plain, ordered = (
        builders.build("interleaved-1f1b", RING, num_micro_batches=16, costs=NETWORK_BOUND, order_messages=order)
        for order in (False, True)
    )
    assert ordered.ports_in_order
    assert ordered.parameters["order_messages"]
    assert simulate(ordered, NETWORK_BOUND).makespan < simulate(plain, NETWORK_BOUND).makespan
    fast = StageCosts(attention=1, ffn=1, transfer=0.5)
    built = [
        builders.build("interleaved-1f1b", RING, num_micro_batches=16, costs=fast, order_messages=order)
        for order in (False, True)
    ]
    assert built[0] == built[1], "already at the bound"


@pytest.mark.parametrize("kind", ["interleaved-1f1b", "split-backward"])
def test_messages_are_ordered_beside_second_dispatches_and_lanes(kind: str) -> None:
    """Within the cap, on FFN groups too, which keep nothing between forward and backward."""
    costs = StageCosts(attention=1, ffn=1, transfer=0.8, lane=0.4)
    plain, ordered = (
        builders.build(
            kind,
            RING,
            num_micro_batches=16,
            costs=costs,
            max_live=14,
            redispatch=True,
            order_messages=order,
        )
        for order in (False, True)
    )
    assert ordered.ports_in_order
    assert verify(ordered, max_live=14).ok
    assert sum(action.kind is Kind.D for actions in ordered.actions.values() for action in actions) == 8 * 16
    bound = lower_bounds(Workload.of(ordered, costs), max_live=14).cap
    assert bound <= simulate(ordered, costs).makespan < simulate(plain, costs).makespan


def test_what_is_dispatched_again_needs_no_place() -> None:
    """One FFN group for two attention groups has twice as many stages under way as either, and keeps none of them."""
    costs = StageCosts(attention=2, ffn=1, transfer=0.8)
    placement = Placement.round_robin(num_layers=8, num_attention_groups=2, num_ffn_groups=1)
    plain = builders.build("interleaved-1f1b", placement, num_micro_batches=16, costs=costs)
    start = begun(plain, costs, again=True)
    cap = most_live(start.orders, redispatch=True)
    assert cap < most_live(simulate_orders(Orders.of(plain), costs).orders)
    assert min(run.makespan for run in improved(start, costs, passes=3, max_live=cap)) <= start.makespan


def test_where_messages_cannot_be_ordered() -> None:
    with pytest.raises(ValueError, match="transfers take no time"):
        builders.build(
            "interleaved-1f1b",
            RING,
            num_micro_batches=8,
            costs=StageCosts(attention=1, ffn=1, transfer=0),
            order_messages=True,
        )
