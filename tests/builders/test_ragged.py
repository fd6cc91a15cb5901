"""Rings that do not divide the layers: small groups of micro-batches must not make workers wait in a circle."""

from __future__ import annotations

import pytest

from megatron_disagmoe import builders
from megatron_disagmoe.builders.interleaved import Shape, interleaved, padded
from megatron_disagmoe.schedules.actions import Placement
from megatron_disagmoe.schedules.liveness import peak_live
from megatron_disagmoe.schedules.orders import Orders
from megatron_disagmoe.simulator.costs import StageCosts
from megatron_disagmoe.simulator.simulate import simulate_orders

COSTS = StageCosts(attention=1.0, ffn=1.0, transfer=0.5)


@pytest.mark.parametrize(("ring", "layers"), [(2, 5), (3, 8), (4, 9), (4, 11), (5, 13), (3, 2)])
def test_padded_orders_run_where_those_of_the_next_even_depth_do(ring: int, layers: int) -> None:
    even = -(-layers // ring) * ring
    for size, slope in ((3 * ring, 1.0), (4 * ring, 2.0)):
        shape = Shape(ring, size, slope, extra=1)
        full = simulate_orders(interleaved(shape, num_layers=even, num_micro_batches=24), COSTS)
        orders = padded(shape, num_layers=layers, num_micro_batches=24)
        run = simulate_orders(orders, COSTS)
        assert len(orders) == 2 * 24 * (2 * layers + 1)
        assert set(orders.stage.tolist()) == set(range(2 * layers + 1))
        assert run.makespan <= full.makespan


def test_padding_changes_nothing_where_the_ring_divides_the_layers() -> None:
    shape = Shape(3, 12, slope=2.0, extra=1)
    same = interleaved(shape, num_layers=9, num_micro_batches=24)
    other = padded(shape, num_layers=9, num_micro_batches=24)
    for name in ("kind", "stage", "micro_batch", "bounds"):
        assert (getattr(same, name) == getattr(other, name)).all()


def test_a_cap_at_uneven_depth_leaves_a_pipeline() -> None:
    """Stage times of DeepSeek-V3 with room for 1.6 L: one micro-batch at a time would take seven times as long."""
    costs = StageCosts(
        attention=4.4, ffn=2.8, transfer=2.7, lane=2.8, tail=11.5, recompute_attention=0.22, recompute_ffn=0.93
    )
    placement = Placement.round_robin(num_layers=58, num_attention_groups=5, num_ffn_groups=5)
    made = builders.build("interleaved-1f1b", placement, num_micro_batches=128, costs=costs, max_live=94)
    assert max(peak_live(made).values()) <= 94
    alone = builders.build("sequential", placement, num_micro_batches=128, costs=costs)
    took, one_by_one = (simulate_orders(Orders.of(each), costs).makespan for each in (made, alone))
    assert took < one_by_one / 4
