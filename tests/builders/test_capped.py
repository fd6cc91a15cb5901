"""Orders under a cap stay near its bound, whatever the sizes: no builder falls back to one micro-batch at a time."""

from __future__ import annotations

import pytest

from megatron_disagmoe import builders
from megatron_disagmoe.builders.redispatch import redispatching
from megatron_disagmoe.schedules.actions import Placement
from megatron_disagmoe.schedules.dataflow import redispatched
from megatron_disagmoe.schedules.liveness import peak_live
from megatron_disagmoe.schedules.orders import Orders
from megatron_disagmoe.schedules.verifier import verify
from megatron_disagmoe.simulator.bounds import Workload
from megatron_disagmoe.simulator.costs import StageCosts
from megatron_disagmoe.simulator.simulate import simulate, simulate_orders
from megatron_disagmoe.simulator.step_bound import step_bound

#: Busy groups run one forward and one backward in turn, 3 times a stage. From a group to the next and back takes more
#: than 3; in that rhythm it takes a multiple of it, so at most twice as much. Then activations live at most twice as
#: long as they must, and as the cap's bound is n times their life over the cap, a step takes at most twice as long.
RHYTHM = 2.0


@pytest.mark.parametrize(
    ("p", "layers", "n", "transfer", "caps"),
    [
        (1, 6, 12, 0.5, (8, 12, 20)),
        (2, 8, 16, 0.5, (5, 6, 9, 14)),
        (2, 13, 24, 1.0, (8, 12, 17)),
        (3, 16, 24, 0.5, (7, 17, 30)),
        (4, 30, 32, 1.0, (40, 70)),
        (8, 94, 128, 0.5, (183,)),
        (8, 94, 128, 1.0, (183,)),
    ],
)
def test_no_cap_is_far_above_its_bound(p: int, layers: int, n: int, transfer: float, caps: tuple[int, ...]) -> None:
    placement = Placement.round_robin(num_layers=layers, num_attention_groups=p, num_ffn_groups=p)
    costs = StageCosts(attention=1, ffn=1, transfer=transfer)
    for cap in caps:
        made = builders.build("interleaved-1f1b", placement, num_micro_batches=n, costs=costs, max_live=cap)
        assert max(peak_live(made).values()) <= cap
        orders = Orders.of(made)
        bound = step_bound(Workload.of(orders, costs), max_live=cap)
        assert simulate_orders(orders, costs).makespan <= RHYTHM * bound, f"cap {cap}"


def test_orders_are_judged_with_their_second_dispatches() -> None:
    """The best order without them is not the best with them."""
    placement = Placement.round_robin(num_layers=16, num_attention_groups=2, num_ffn_groups=2)
    for cap, transfer in ((20, 0.5), (14, 0.9)):
        costs = StageCosts(attention=1, ffn=1, transfer=transfer, recompute_ffn=1)
        made = builders.build(
            "interleaved-1f1b", placement, num_micro_batches=24, costs=costs, max_live=cap, redispatch=True
        )
        assert made.parameters["redispatch"]
        assert redispatched(made) == {(layer, m) for layer in range(16) for m in range(24)}
        report = verify(made, max_live=cap)
        assert report.ok, report.explain()
        plain = builders.build("interleaved-1f1b", placement, num_micro_batches=24, costs=costs, max_live=cap)
        added = redispatching(plain, costs)
        took, afterwards = simulate(made, costs).makespan, simulate(added, costs).makespan
        assert took < afterwards, f"cap {cap}"
        assert took >= step_bound(Workload.of(made, costs), max_live=cap)
