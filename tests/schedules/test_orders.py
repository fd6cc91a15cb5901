"""Orders as arrays: there and back, and with every stage's micro-batches in order."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_disagmoe import builders
from megatron_disagmoe.schedules.actions import Action, Kind, Placement, Schedule
from megatron_disagmoe.schedules.liveness import peak_live
from megatron_disagmoe.schedules.lowering import compute_only, lowered
from megatron_disagmoe.schedules.orders import Orders, in_micro_batch_order
from megatron_disagmoe.schedules.verifier import verify
from megatron_disagmoe.simulator.simulate import simulate_orders
from tests.schedules.strategies import runnable_computes, sent_late

COSTS = builders.NOMINAL_COSTS


def _orders(kind: str, groups: tuple[int, int], layers: int, n: int) -> Orders:
    placement = Placement.round_robin(
        num_layers=max(layers, *groups), num_attention_groups=groups[0], num_ffn_groups=groups[1]
    )
    return Orders.of(builders.build(kind, placement, num_micro_batches=n, costs=COSTS))


def _shuffled(orders: Orders, permutation: list[int]) -> Orders:
    """The same with the micro-batches renamed: as good a schedule, in another order."""
    renamed = np.array(permutation, np.int64)[orders.micro_batch]
    return Orders(
        orders.placement, orders.num_micro_batches, False, orders.kind, orders.stage, renamed, orders.bounds
    )


@settings(max_examples=40, deadline=None)
@given(
    kind=st.sampled_from(builders.KINDS),
    groups=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    layers=st.integers(1, 5),
    data=st.data(),
)
def test_order_costs_nothing(kind: str, groups: tuple[int, int], layers: int, data: st.DataObject) -> None:
    n = data.draw(st.integers(1, 8))
    built = _orders(kind, groups, layers, n)
    shuffled = _shuffled(built, data.draw(st.permutations(range(n))))
    ordered = in_micro_batch_order(shuffled)
    schedule = ordered.schedule({})
    assert verify(schedule).ok
    assert peak_live(schedule) == peak_live(shuffled.schedule({}))
    assert simulate_orders(ordered, COSTS).makespan == pytest.approx(simulate_orders(shuffled, COSTS).makespan)
    for actions in schedule.actions.values():
        for stage in {(action.kind, action.layer) for action in actions}:
            batches = [action.micro_batch for action in actions if (action.kind, action.layer) == stage]
            assert batches == sorted(batches)


def test_a_stage_may_change_its_order_on_the_way_back() -> None:
    """Forward 1 before 0 and backward 0 before 1, on one group's list."""
    f, b = Kind.F, Kind.B
    a0 = (Action(f, 0, 1), Action(f, 0, 0), Action(f, 1, 1), Action(b, 1, 1), Action(f, 1, 0), Action(b, 1, 0))
    attention = (*a0, Action(b, 0, 0), Action(b, 0, 1))
    ffn = (Action(f, 0, 1), Action(f, 0, 0), Action(b, 0, 0), Action(b, 0, 1))
    placement = Placement(1, 1, (0, 0), (0,))
    groups = placement.groups
    schedule = Schedule(placement, 2, False, {groups[0]: attention, groups[1]: ffn}, {})
    assert verify(schedule).ok
    ordered = in_micro_batch_order(Orders.of(schedule)).schedule({})
    assert verify(ordered).ok
    assert [action.micro_batch for action in ordered.actions[groups[0]]] == [0, 1, 0, 0, 1, 1, 0, 1]
    assert [action.micro_batch for action in ordered.actions[groups[1]]] == [0, 1, 0, 1]


def test_orders_are_read_and_written_back() -> None:
    schedule = builders.build(
        "split-backward",
        Placement.round_robin(num_layers=3, num_attention_groups=2, num_ffn_groups=1),
        num_micro_batches=5,
        costs=COSTS,
    )
    assert Orders.of(schedule).schedule(schedule.parameters) == schedule


@given(sent_late(runnable_computes()))
@settings(deadline=None)
def test_late_sends_are_read_and_written_back(schedule: Schedule) -> None:
    """Only those that are late are written; the others are derived again where they were."""
    orders = Orders.of(schedule)
    written = orders.schedule({})
    assert sum(map(len, written.actions.values())) == len(orders) + (0 if orders.late is None else len(orders.late))
    again = Orders.of(lowered(written))
    assert np.array_equal(again.kind, orders.kind)
    assert (again.late is None) == (orders.late is None)
    if orders.late is not None and again.late is not None:
        for name in ("maker", "stride", "after"):
            assert np.array_equal(getattr(again.late, name), getattr(orders.late, name))
    assert Orders.of(compute_only(schedule)).late is None
