"""Lower bounds: worked by hand, and never above what any schedule takes."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_disagmoe import builders
from megatron_disagmoe.schedules.actions import Placement, Schedule
from megatron_disagmoe.schedules.liveness import peak_live
from megatron_disagmoe.schedules.orders import Orders
from megatron_disagmoe.simulator.bounds import Paths, Workload, busy_bound, fill_bound, lower_bounds
from megatron_disagmoe.simulator.costs import StageCosts
from megatron_disagmoe.simulator.live_bound import hills, spread
from megatron_disagmoe.simulator.simulate import simulate_orders
from tests.schedules.strategies import placements, runnable_computes
from tests.simulator.strategies import busy_orders, stage_costs


def ring(p: int, layers: int) -> Placement:
    return Placement.round_robin(num_layers=layers, num_attention_groups=p, num_ffn_groups=p)


@pytest.mark.parametrize("transfer", [0.5, 1.0])
@pytest.mark.parametrize("n", [16, 32, 64])
@pytest.mark.parametrize("p, v", [(1, 4), (2, 4), (4, 8)])
def test_balanced_ring(p: int, v: int, n: int, transfer: float) -> None:
    """F_(p-1) waits for p A's, p - 1 F's and 2p - 1 transfers, both ways, and for nothing else."""
    costs = StageCosts(attention=1, ffn=1, transfer=transfer)
    bounds = lower_bounds(Workload.uniform(ring(p, p * v), costs, num_micro_batches=n))
    assert bounds.busy == 3 * n * v
    assert bounds.fill == pytest.approx(3 * n * v + (p - 1) * (3 + 3 + 4 * transfer) + 2 * transfer + 3)


# One attention group, one FFN group, two layers, three micro-batches; A 1, F 2, M2N 0.5, N2M 0.25, backward twice.
_SMALL = {"attention": 1, "ffn": 2, "transfer": 0.5, "combine": 0.25}


@pytest.mark.parametrize(
    "extra, changes, busy, fill",
    [
        # F0: 3 micro-batches of 2 layers of 2 + 4, after A(0) and M2N, before dM2N and B of A(0)
        ({}, {}, 36, 1 + 0.5 + 36 + 0.5 + 2),
        # A0 computes 3 * (2 * (1 + 2) + tail of 7 + 14) = 81, from the first moment to the last
        ({"tail": 7}, {}, 81, 81),
        # the embedding delays the first dispatch, and its gradient the end
        ({"embedding": 1}, {}, 36, 2 + 0.5 + 36 + 0.5 + 4),
        # F0 ends with a weight gradient
        ({}, {"split_backward": True}, 36, 1 + 0.5 + 36),
        # forward only: after its last F(1) the combine and the tail, which takes no time
        ({}, {"forward_only": True}, 12, 1 + 0.5 + 12 + 0.25),
        ({"tail": 1}, {"forward_only": True}, 12, 1 + 0.5 + 12 + 0.25 + 1),
        # ports: A0 sends 3 * 2 dispatches of 10 and 3 * 2 gradients of combine of 0.25, and the last then needs that
        # F(0) (4), the gradient of dispatch (10) and A(0) (2); F0 receives the same
        ({"transfer": 10}, {}, 61.5, 1 + 61.5 + 4 + 10 + 2),
        # dispatched again: 3 * 2 dispatches more; the last may be for F(0), which then runs 2 again before 4
        ({"transfer": 10}, {"redispatch": True}, 121.5, 1 + 121.5 + 6 + 10 + 2),
        # recomputation lengthens backward, of F(1) by 2 and of A(0) by 1
        ({"recompute_attention": 1, "recompute_ffn": 1}, {}, 48, 1 + 0.5 + 48 + 0.5 + 3),
    ],
)
def test_worked_by_hand(extra: dict[str, float], changes: dict[str, bool], busy: float, fill: float) -> None:
    costs = StageCosts(**{**_SMALL, **extra})
    bounds = lower_bounds(Workload.uniform(ring(1, 2), costs, num_micro_batches=3, **changes))
    assert bounds.busy == pytest.approx(busy)
    assert bounds.fill == pytest.approx(fill)
    assert bounds.phase >= bounds.fill


def test_lanes_use_ports_and_may_be_the_longest_way() -> None:
    """Two layers, the second A stage and the tail on groups of their own: A0 - A1 - A2."""
    placement = Placement(3, 1, (0, 1, 2), (0, 0))
    costs = StageCosts(attention=1, ffn=1, transfer=1, lane=10, tail=1)
    bounds = lower_bounds(Workload.uniform(placement, costs, num_micro_batches=2))
    # A1 sends 2 * (1 + 10) forward and as much back, and receives as much
    assert bounds.busy == 44
    # A0 sends 2 * (1 + 10) from 1 on; its last lane meets A(1), a lane, the tail there and back, a lane, B of A(1), a
    # lane, B of A(0): longer than the way through the FFN stages
    assert bounds.fill == 1 + 22 + (1 + 10 + 1 + 2 + 10 + 2 + 10 + 2)


def test_first_phase_binds_where_the_network_does() -> None:
    """p = 4, L = 32, n = 64, transfers 1.5: before its first backward an FFN group gets a forward every 1.5."""
    costs = StageCosts(attention=1, ffn=1, transfer=1.5)
    bounds = lower_bounds(Workload.uniform(ring(4, 32), costs, num_micro_batches=64))
    # F3 receives 64 * 8 * 3 from 3 * (2 + 3) + 1 on, and its last gradient meets B of F(3), A(3), F(2) .. A(0)
    assert bounds.fill == pytest.approx(16 + 1536 + 2 + 3.5 + 3 * 7)
    # after its last dispatch there are F(31), the tail of no time, 64 backwards and 65 transfers: 226.5, in which
    # F3, whose last backward ends 24.5 before the end, turns at most 202 / 2 gradients over, and so receives 101 * 1.5
    assert bounds.phase == pytest.approx(16 + (1536 - 151.5) + 226.5)


def test_at_the_least_cap_micro_batches_follow_one_another() -> None:
    """A0 holds A(0), A(4) and the tail: with room for three, one reaches the tail when the one before is all the way
    back. Forward is 8 layers of 2 stages and 2 transfers (24), backward 40; a schedule takes just that.
    """
    costs, n = StageCosts(attention=1, ffn=1, transfer=0.5), 5
    schedule = builders.build("interleaved-1f1b", ring(4, 8), num_micro_batches=n, costs=costs, max_live=3)
    assert max(peak_live(schedule).values()) == 3
    bound = lower_bounds(Workload.of(schedule, costs), max_live=3).cap
    assert bound == pytest.approx(24 + n * 40)
    assert simulate_orders(Orders.of(schedule), costs).makespan == pytest.approx(bound)


def test_spread_worked_by_hand() -> None:
    """One layer, stages of 1 and transfers of 1: A(0) lives from 0 to 10, F(0) from 2 to 7, the tail for no time.

    A0's hill is one step of 10 and no slope, so n * 10 / K; nothing is before or after it.
    """
    costs = StageCosts(attention=1, ffn=1, transfer=1)
    paths = Paths(Workload.uniform(ring(1, 1), costs, num_micro_batches=12))
    attention, ffn = hills(paths)
    assert (attention.rise.tolist(), attention.fall.tolist()) == ([4, 0], [6, 0])
    assert (ffn.rise.tolist(), ffn.fall.tolist(), ffn.before, ffn.after) == ([0], [5], 2, 8)
    assert spread(attention, 12, 3) == pytest.approx(12 * 10 / 3)
    # F0: a step of 5, two before it and three behind
    assert spread(ffn, 12, 3) == pytest.approx(12 * 5 / 3 + 2 + 3)
    with pytest.raises(ValueError, match="one micro-batch needs 2"):
        lower_bounds(Workload.uniform(ring(1, 1), costs, num_micro_batches=12), max_live=1)


def check(orders: Orders, costs: StageCosts) -> None:
    """Every bound, and that of the cap which the order just keeps."""
    live = max(peak_live(orders.schedule({})).values())
    bounds = lower_bounds(Workload.of(orders, costs), max_live=live)
    assert bounds.busy <= bounds.fill <= bounds.phase <= bounds.cap
    assert bounds.cap <= simulate_orders(orders, costs).makespan * (1 + 1e-9)


@settings(deadline=None)
@given(runnable_computes(), stage_costs())
def test_no_schedule_is_faster(schedule: Schedule, costs: StageCosts) -> None:
    """Any order, splits and re-dispatches mixed."""
    check(Orders.of(schedule), costs)


@settings(max_examples=300, deadline=None)
@given(stage_costs().flatmap(lambda costs: st.tuples(busy_orders(costs), st.just(costs))))
def test_no_busy_schedule_is_faster(drawn: tuple[Orders, StageCosts]) -> None:
    """Orders without needless idling, in small machines, where bounds are tight."""
    check(*drawn)


@settings(max_examples=50, deadline=None)
@given(
    placements(max_groups=3, max_layers=6),
    stage_costs(),
    st.integers(1, 12),
    st.sampled_from(builders.KINDS),
    st.booleans(),
)
def test_no_built_schedule_is_faster(
    placement: Placement, costs: StageCosts, n: int, kind: str, forward_only: bool
) -> None:
    schedule = builders.build(kind, placement, num_micro_batches=n, costs=costs, forward_only=forward_only)
    check(Orders.of(schedule), costs)


def test_shorthands_read_the_schedule() -> None:
    costs = StageCosts(attention=1, ffn=1, transfer=0.5)
    schedule = builders.build("sequential", ring(2, 4), num_micro_batches=2, costs=costs)
    expected = lower_bounds(Workload.uniform(ring(2, 4), costs, num_micro_batches=2))
    assert (busy_bound(schedule, costs), fill_bound(schedule, costs)) == (expected.busy, expected.fill)
