"""Dispatching again: where ``D`` stands, what it costs, what it saves."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_disagmoe import builders
from megatron_disagmoe.builders.redispatch import redispatching
from megatron_disagmoe.schedules.actions import Edge, Kind, Placement, Side
from megatron_disagmoe.schedules.dataflow import redispatched
from megatron_disagmoe.schedules.liveness import peak_live
from megatron_disagmoe.schedules.verifier import verify
from megatron_disagmoe.simulator.bounds import Workload, lower_bounds
from megatron_disagmoe.simulator.costs import StageCosts
from megatron_disagmoe.simulator.simulate import simulate
from tests.schedules.strategies import placements
from tests.simulator.strategies import stage_costs

pytestmark = pytest.mark.usefixtures("little_effort")


@settings(deadline=None, max_examples=40)
@given(placements(max_groups=3, max_layers=5), stage_costs(), st.integers(1, 6), st.sampled_from(builders.KINDS))
def test_everything_is_dispatched_again_safely(
    placement: Placement, costs: StageCosts, n: int, kind: str
) -> None:
    schedule = builders.build(kind, placement, num_micro_batches=n, costs=costs)
    again = redispatching(schedule, costs)
    assert redispatched(again) == {(layer, m) for layer in range(placement.num_layers) for m in range(n)}
    for group, actions in again.actions.items():
        assert tuple(a for a in actions if a.kind is not Kind.D) == schedule.actions[group]
    report = verify(again)
    assert report.ok, report.explain()
    before = peak_live(schedule)
    for group, most in peak_live(again).items():
        assert most == before[group] if group.side is Side.A else most <= before[group]


@pytest.mark.parametrize("transfer, more", [(0.25, 1.0), (0.5, 1.0), (1.0, 1.03)])
def test_hidden_where_the_ports_have_room(transfer: float, more: float) -> None:
    """Beside stages that run their forward again anyway: F groups hold one activation, and nothing takes longer."""
    placement = Placement.round_robin(num_layers=8, num_attention_groups=2, num_ffn_groups=2)
    costs = StageCosts(attention=1, ffn=1, transfer=transfer, recompute_ffn=1)
    schedule = builders.build("interleaved-1f1b", placement, num_micro_batches=16, costs=costs)
    again = redispatching(schedule, costs)
    assert simulate(again, costs).makespan <= more * simulate(schedule, costs).makespan
    assert simulate(again, costs).makespan >= lower_bounds(Workload.of(again, costs)).phase
    assert {most for group, most in peak_live(again).items() if group.side is Side.F} == {1}
    # it arrives no earlier than needs be: few lie in buffers
    posted = [count for channel, count in verify(again).peak_posted.items() if channel.edge is Edge.AGAIN]
    assert max(posted) <= 5


def test_forward_only_has_nothing_to_dispatch_again() -> None:
    placement = Placement.round_robin(num_layers=2, num_attention_groups=1, num_ffn_groups=1)
    costs = StageCosts(attention=1, ffn=1, transfer=1)
    schedule = builders.build("interleaved-1f1b", placement, num_micro_batches=2, costs=costs, forward_only=True)
    assert redispatching(schedule, costs) is schedule
