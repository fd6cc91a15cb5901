"""Whatever the sizes, what a builder builds can run."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_disagmoe import builders
from megatron_disagmoe.schedules.actions import Placement
from megatron_disagmoe.schedules.verifier import verify
from megatron_disagmoe.simulator.costs import StageCosts
from tests.schedules.strategies import placements

pytestmark = pytest.mark.usefixtures("little_effort")

round_robin = st.integers(1, 10).flatmap(
    lambda layers: st.builds(
        Placement.round_robin,
        num_layers=st.just(layers),
        num_attention_groups=st.integers(1, min(4, layers)),
        num_ffn_groups=st.integers(1, min(4, layers)),
    )
)
times = st.sampled_from((0.0, 0.3, 0.5, 1.0, 1.5, 2.5))
costs = st.builds(
    StageCosts,
    attention=st.sampled_from((0.5, 1.0, 2.0)),
    ffn=st.sampled_from((0.6, 1.0, 1.7)),
    transfer=times,
    combine=st.none() | times,
    lane=st.sampled_from((0.0, 0.1)),
    tail=times,
    embedding=times,
)


@settings(deadline=None, max_examples=150)
@given(
    kind=st.sampled_from(builders.KINDS),
    placement=round_robin | placements(),
    num_micro_batches=st.integers(1, 20),
    costs=costs,
    group_size=st.none() | st.integers(1, 24),
    slack=st.none() | st.integers(0, 40),
    forward_only=st.booleans(),
    redispatch=st.booleans(),
    order_messages=st.booleans(),
)
def test_every_schedule_is_safe_and_within_its_cap(
    kind: str,
    placement: Placement,
    num_micro_batches: int,
    costs: StageCosts,
    group_size: int | None,
    slack: int | None,
    forward_only: bool,
    redispatch: bool,
    order_messages: bool,
) -> None:
    cap = None if slack is None else builders.least_live(placement, forward_only=forward_only) + slack
    schedule = builders.build(
        kind,
        placement,
        num_micro_batches=num_micro_batches,
        costs=costs,
        group_size=group_size,
        max_live=cap,
        forward_only=forward_only,
        redispatch=redispatch,
        order_messages=order_messages and min(costs.edge(0), costs.edge(1)) > 0,
    )
    report = verify(schedule, max_live=cap)
    assert report.ok, report.explain()
