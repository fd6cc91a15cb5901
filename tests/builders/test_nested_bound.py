"""The bound for few micro-batches: never above what a schedule takes, and by hand."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_disagmoe import builders
from megatron_disagmoe.schedules.actions import Placement
from megatron_disagmoe.simulator.bounds import Workload
from megatron_disagmoe.simulator.costs import StageCosts
from megatron_disagmoe.simulator.nested_bound import nested_bound
from megatron_disagmoe.simulator.simulate import simulate
from tests.schedules.strategies import placements
from tests.simulator.strategies import stage_costs


@settings(deadline=None, max_examples=60)
@given(placements(), stage_costs(), st.sampled_from(builders.KINDS), st.integers(1, 8), st.booleans())
def test_no_schedule_is_faster(
    placement: Placement, costs: StageCosts, kind: str, n: int, forward_only: bool
) -> None:
    schedule = builders.build(kind, placement, num_micro_batches=n, costs=costs, forward_only=forward_only)
    bound = nested_bound(Workload.of(schedule, costs))
    assert simulate(schedule, costs).makespan >= bound * (1 - 1e-9)


def test_by_hand() -> None:
    """Two layers, one group a side. One micro-batch: four stages of 3 and eight transfers, 16.

    Three: F(1) alone is reached after 4.5, has 9 of work, and 7.5 of way down: 21. Both stages of F0: 1.5 + 18 + 2.5.
    """
    placement = Placement.round_robin(num_layers=2, num_attention_groups=1, num_ffn_groups=1)
    costs = StageCosts(attention=1, ffn=1, transfer=0.5)
    for n, bound in ((1, 16.0), (3, 22.0)):
        assert nested_bound(Workload.uniform(placement, costs, num_micro_batches=n)) == bound
