"""The bounds for few micro-batches and for slow neighbours: never above what a schedule takes, and by hand."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_disagmoe import builders
from megatron_disagmoe.schedules.actions import Placement
from megatron_disagmoe.simulator.bounds import Workload
from megatron_disagmoe.simulator.costs import StageCosts
from megatron_disagmoe.simulator.feed_bound import feed_bound
from megatron_disagmoe.simulator.nested_bound import nested_bound
from megatron_disagmoe.simulator.simulate import simulate
from tests.schedules.strategies import placements
from tests.simulator.strategies import stage_costs

pytestmark = pytest.mark.usefixtures("little_effort")


@settings(deadline=None, max_examples=60)
@given(placements(), stage_costs(), st.sampled_from(builders.KINDS), st.integers(1, 8), st.booleans())
def test_no_schedule_is_faster(
    placement: Placement, costs: StageCosts, kind: str, n: int, forward_only: bool
) -> None:
    schedule = builders.build(kind, placement, num_micro_batches=n, costs=costs, forward_only=forward_only)
    workload = Workload.of(schedule, costs)
    bound = max(nested_bound(workload), feed_bound(workload))
    assert simulate(schedule, costs).makespan >= bound * (1 - 1e-9)


def test_by_hand() -> None:
    """Two layers, one group a side. One micro-batch: four stages of 3 and eight transfers, 16.

    Three: F(1) alone is reached after 4.5, has 9 of work, and 7.5 of way down: 21. Both stages of F0: 1.5 + 18 + 2.5.
    """
    placement = Placement.round_robin(num_layers=2, num_attention_groups=1, num_ffn_groups=1)
    costs = StageCosts(attention=1, ffn=1, transfer=0.5)
    for n, bound in ((1, 16.0), (3, 22.0)):
        assert nested_bound(Workload.uniform(placement, costs, num_micro_batches=n)) == bound


def test_slow_neighbour_by_hand() -> None:
    """Two groups a side, eight layers, four micro-batches; A(0) takes 1.5 and its backward 3, all else 1 and 2.

    F1 begins at 5 and has nothing but F(1) to run until 11: A(0) hands over the four by 10.5, 4 of 6 is done. All but
    backwards of F(1) has ended 18.5 before the end, those have ended 8.5 before it. The last of them is followed by one
    backward of A(0), the one before by two: in those 10 they can do 2 + 2 + 2 + 1. Of 48 the rest lies between.
    """
    placement = Placement.round_robin(num_layers=8, num_attention_groups=2, num_ffn_groups=2)
    costs = StageCosts(attention=1, ffn=1, transfer=0.5, embedding=0.5)
    assert feed_bound(Workload.uniform(placement, costs, num_micro_batches=4)) == 11 + (48 - 4 - 7) + 18.5
