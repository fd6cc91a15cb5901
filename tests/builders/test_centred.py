"""Timetables laid from the middle of a micro-batch's way outwards."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_disagmoe.builders.centred import Outward, centred, fit_late
from megatron_disagmoe.builders.timetable import Steps, circle, most_alive, steps_of
from megatron_disagmoe.schedules.actions import Placement
from megatron_disagmoe.simulator.costs import StageCosts
from megatron_disagmoe.simulator.workload import Paths, Workload
from tests.builders.test_paced import taken
from tests.schedules.strategies import placements
from tests.simulator.strategies import stage_costs


def steps(placement: Placement, costs: StageCosts, *, redispatch: bool = False) -> Steps:
    return steps_of(Paths(Workload.uniform(placement, costs, num_micro_batches=1, redispatch=redispatch)))


@settings(deadline=None, max_examples=60)
@given(placements(max_groups=3, max_layers=6), stage_costs(), st.floats(1.0, 3.0), st.booleans())
def test_nothing_meets_and_everything_waits_for_what_it_needs(
    placement: Placement, costs: StageCosts, slack: float, redispatch: bool
) -> None:
    made = steps(placement, costs, redispatch=redispatch)
    period = int(made.work * slack) + int(made.scale)
    most = 4 * placement.num_layers + 4
    times = centred(made, Outward.of(made), period, most, tries=20)
    if times is None:
        return
    assert times.min() == 0
    assert most_alive(times[None], period, made.num_groups, made.keeps, made.duration, made.compute) <= most
    for resource in range(3 * made.num_groups):
        spells = sorted((start % period, length) for start, length in taken(made, times, resource))
        around = [*spells[1:], *((start + period, length) for start, length in spells[:1])]
        for (start, length), (following, _) in zip(spells, around, strict=True):
            assert start + length <= following
    for step in range(len(times)):
        for before in (made.after[step], made.also[step]):
            assert before < 0 or times[before] + made.duration[before] <= times[step]


def test_alone_nothing_waits() -> None:
    """With all the time in the world a micro-batch takes as long as it does alone."""
    placement = Placement.round_robin(num_layers=6, num_attention_groups=2, num_ffn_groups=3)
    made = steps(placement, StageCosts(attention=1, ffn=2, transfer=0.5, combine=0.25, tail=0.5, embedding=0.75))
    times = centred(made, Outward.of(made), 10 * int(made.alone[-1]), 6, tries=1)
    assert times is not None
    assert times.tolist() == made.alone.tolist()


def test_fewer_activations_than_laid_from_the_start() -> None:
    """Four groups a side, eight layers each, a micro-batch every 28: laid from the start it does not fit at all."""
    placement = Placement.round_robin(num_layers=32, num_attention_groups=4, num_ffn_groups=4)
    made = steps(placement, StageCosts(attention=1, ffn=1, transfer=0.5))
    period = round(28 * made.scale)
    _, fits = circle(np.zeros(1, np.int64), period, made.num_groups, made.busiest, *made.needs)
    assert not fits
    times = centred(made, Outward.of(made), period, 47, tries=400)
    assert times is not None
    period = round(30 * made.scale)
    greedy, fits = circle(np.zeros(1, np.int64), period, made.num_groups, made.busiest, *made.needs)
    assert fits
    alive = most_alive(greedy, period, made.num_groups, made.keeps, made.duration, made.compute)
    assert alive > 55
    assert centred(made, Outward.of(made), period, 45, tries=400) is not None


def test_last_moment_before_a_deadline() -> None:
    begin, end = np.array([2, 6, 0]), np.array([4, 9, 0])
    for deadline, time, start in ((10, 1, 9), (9, 1, 5), (6, 2, 4), (6, 3, -1), (2, 3, -1), (16, 2, 14), (5, 0, 5)):
        assert fit_late(begin, end, 2, 10, deadline, time) == start
    assert fit_late(begin, end, 2, 10, 6, 5) < -(1 << 50)
