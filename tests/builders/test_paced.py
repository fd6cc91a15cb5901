"""Timetables without conflicts, and the orders made from them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_disagmoe import builders
from megatron_disagmoe.builders.paced import paced
from megatron_disagmoe.builders.search import most_live
from megatron_disagmoe.builders.sequential import sequential
from megatron_disagmoe.builders.timetable import NEVER, Steps, circle, give_back, most_alive, place, steps_of
from megatron_disagmoe.builders.weights import split_at_once
from megatron_disagmoe.schedules.actions import Kind, Placement
from megatron_disagmoe.schedules.liveness import peak_live
from megatron_disagmoe.schedules.orders import Ints, Orders
from megatron_disagmoe.simulator.bounds import lower_bounds
from megatron_disagmoe.simulator.costs import StageCosts
from megatron_disagmoe.simulator.simulate import simulate, simulate_orders
from megatron_disagmoe.simulator.workload import Paths, Workload
from tests.schedules.strategies import placements
from tests.simulator.strategies import stage_costs


def steps(placement: Placement, costs: StageCosts) -> Steps:
    return steps_of(Paths(Workload.uniform(placement, costs, num_micro_batches=1)))


def taken(made: Steps, times: Ints, resource: int) -> list[tuple[int, int]]:
    """When a resource is taken by one micro-batch: (start, length)."""
    using = np.flatnonzero(((made.first == resource) | (made.second == resource)) & (made.duration > 0))
    return list(zip(times[using].tolist(), made.duration[using].tolist(), strict=True))


@settings(deadline=None, max_examples=60)
@given(
    placements(max_groups=3, max_layers=6),
    stage_costs(),
    st.lists(st.integers(0, 40), min_size=1, max_size=4),
    st.floats(1.0, 4.0),
)
def test_nothing_meets_on_a_circle(
    placement: Placement, costs: StageCosts, releases: list[int], slack: float
) -> None:
    made = steps(placement, costs)
    tick = int(made.scale / 4)
    period = int(made.work * len(releases) * slack) + tick
    times, fits = circle(
        np.array(releases) * tick, period, made.num_groups, made.busiest, *made.needs
    )
    if not fits:
        return
    for resource in range(3 * made.num_groups):
        spells = sorted((start % period, length) for row in times for start, length in taken(made, row, resource))
        around = [*spells[1:], *((start + period, length) for start, length in spells[:1])]
        for (start, length), (following, _) in zip(spells, around, strict=True):
            assert start + length <= following
    for row, release in zip(times, releases, strict=True):
        assert row.min() >= release * tick
        for step in range(len(row)):
            for before in (made.after[step], made.also[step]):
                assert before < 0 or row[before] + made.duration[before] <= row[step]


def test_one_micro_batch_alone_takes_as_long_as_simulated() -> None:
    """Lanes and all: they share ports with what is dispatched and combined."""
    placement = Placement.round_robin(num_layers=4, num_attention_groups=2, num_ffn_groups=2)
    costs = StageCosts(attention=1, ffn=2, transfer=0.5, combine=0.25, tail=0.5, embedding=0.75, lane=6)
    made = steps(placement, costs)
    whole = made.alone[made.compute[-1]] + made.duration[made.compute[-1]]
    assert whole / made.scale == simulate(sequential(placement, num_micro_batches=1), costs).makespan


def test_alive_on_a_circle_worked_by_hand() -> None:
    """One layer on A0 and F0. On A0 A(0) lives from 0 to 9, the tail from 4 to 5.

    Every 4, the third A(0) begins at 8, when the first, the second and the tail of the second are alive.
    """
    placement = Placement.round_robin(num_layers=1, num_attention_groups=1, num_ffn_groups=1)
    made = steps(placement, StageCosts(attention=1, ffn=1, transfer=1, tail=0.5, backward_ratio=1))
    starts = made.alone[made.compute] / made.scale
    assert starts.tolist() == [0, 2, 4, 4.5, 6, 8]
    for period, alive in ((100, 2), (9, 2), (5, 2), (4.5, 3), (4, 4)):
        ticks = int(period * made.scale)
        assert most_alive(made.alone[None], ticks, 2, made.group, made.duration, made.compute) == alive


def test_what_is_given_back_is_free_again() -> None:
    made = steps(
        Placement.round_robin(num_layers=3, num_attention_groups=1, num_ffn_groups=1),
        StageCosts(attention=1, ffn=1, transfer=0.5),
    )
    shape = (3 * made.num_groups, 3 * made.busiest + 1)
    begin, end, count = np.zeros(shape, np.int64), np.zeros(shape, np.int64), np.zeros(shape[0], np.int64)
    period = 3 * made.work + int(made.scale)
    first, again = np.zeros(len(made.duration), np.int64), np.zeros(len(made.duration), np.int64)
    assert place(begin, end, count, period, 0, NEVER, *made.needs, first)
    kept = [(begin[r, :n].tolist(), end[r, :n].tolist()) for r, n in enumerate(count)]
    assert place(begin, end, count, period, int(made.scale), NEVER, *made.needs, again)
    give_back(begin, end, count, period, *made.needs[:3], again, len(again))
    assert [(begin[r, :n].tolist(), end[r, :n].tolist()) for r, n in enumerate(count)] == kept
    # too late to end in time: nothing stays taken
    assert not place(begin, end, count, period, 0, int(first[-1]), *made.needs, again)
    assert [(begin[r, :n].tolist(), end[r, :n].tolist()) for r, n in enumerate(count)] == kept


@settings(deadline=None, max_examples=25)
@given(placements(max_groups=2, max_layers=5), stage_costs(), st.integers(1, 12), st.integers(0, 8))
def test_orders_can_run_and_hold_everything_once(
    placement: Placement, costs: StageCosts, n: int, slack: int
) -> None:
    workload = Workload.uniform(placement, costs, num_micro_batches=n)
    cap = builders.least_live(placement) + slack
    for orders, _ in paced(workload, cap):
        assert simulate_orders(orders, costs).makespan >= lower_bounds(workload, max_live=most_live(orders)).cap * (
            1 - 1e-9
        )
        work = set(zip(orders.kind.tolist(), orders.stage.tolist(), orders.micro_batch.tolist(), strict=True))
        assert len(work) == len(orders) == 2 * (2 * placement.num_layers + 1) * n


@pytest.mark.parametrize(
    "cap, within", [(9, 1.0005), (12, 1.03), (36, 1.055), (52, 1.16)]
)
def test_near_the_bound_of_the_cap(cap: int, within: float) -> None:
    """Four groups a side, eight layers each, 64 micro-batches: what docs/frontier.md shows."""
    placement = Placement.round_robin(num_layers=32, num_attention_groups=4, num_ffn_groups=4)
    costs = StageCosts(attention=1, ffn=1, transfer=0.5)
    schedule = builders.build("interleaved-1f1b", placement, num_micro_batches=64, costs=costs, max_live=cap)
    assert max(peak_live(schedule).values()) <= cap
    bound = lower_bounds(Workload.of(schedule, costs), max_live=cap).cap
    assert bound <= simulate(schedule, costs).makespan <= within * bound


def test_splitting_at_once_changes_no_peak() -> None:
    placement = Placement.round_robin(num_layers=3, num_attention_groups=2, num_ffn_groups=1)
    whole = sequential(placement, num_micro_batches=3)
    split = split_at_once(Orders.of(whole)).schedule({})
    assert peak_live(split) == peak_live(whole)
    for group, actions in split.actions.items():
        kinds = [action.kind for action in actions]
        assert [kind for kind in kinds if kind is not Kind.W] == [
            Kind.I if action.kind is Kind.B else action.kind for action in whole.actions[group]
        ]
        for at, action in enumerate(actions):
            if action.kind is Kind.I:
                assert actions[at + 1] == action._replace(kind=Kind.W)
