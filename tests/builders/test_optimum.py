"""The optimum of small instances: against every order tried one by one, and against bounds and builders."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from megatron_disagmoe import builders
from megatron_disagmoe.schedules.actions import Placement
from megatron_disagmoe.schedules.orders import B, F, group_of_stage, sorted_orders
from megatron_disagmoe.simulator.bounds import Workload, lower_bounds
from megatron_disagmoe.simulator.costs import StageCosts
from megatron_disagmoe.simulator.optimum import least_makespan
from megatron_disagmoe.simulator.simulate import simulate, simulate_orders

COSTS = StageCosts(attention=1, ffn=1, transfer=0.5)


def ring(layers: int, p: int) -> Placement:
    return Placement.round_robin(num_layers=layers, num_attention_groups=p, num_ffn_groups=p)


def interleavings(actions: list[list[tuple[int, int, int]]]) -> list[tuple[tuple[int, int, int], ...]]:
    """Every way to merge lists, each kept in its order."""
    if not any(actions):
        return [()]
    merged = []
    for number, each in enumerate(actions):
        if each:
            rest = [*actions[:number], each[1:], *actions[number + 1 :]]
            merged += [(each[0], *others) for others in interleavings(rest)]
    return merged


def every_order(placement: Placement, n: int, cap: int, costs: StageCosts) -> float:
    """The best makespan over all orders of all groups, micro-batches of a stage in turn, ports and all."""
    groups = group_of_stage(placement)
    choices = []
    for group in range(len(placement.groups)):
        stages = [stage for stage in range(2 * placement.num_layers + 1) if groups[stage] == group]
        lists = [[(kind, stage, m) for m in range(n)] for stage in stages for kind in (F, B)]
        choices.append([order for order in interleavings(lists) if within(order, cap)])
    best = float("inf")
    for chosen in itertools.product(*choices):
        flat = [action for order in chosen for action in order]
        kind, stage, micro_batch = np.array(flat, np.int64).T
        orders = sorted_orders(
            placement,
            num_micro_batches=n,
            forward_only=False,
            kind=kind,
            stage=stage,
            micro_batch=micro_batch,
            keys=(np.arange(len(flat)),),
        )
        try:
            best = min(best, simulate_orders(orders, costs).makespan)
        except ValueError:
            continue  # they wait for each other
    return best


def within(order: tuple[tuple[int, int, int], ...], cap: int) -> bool:
    """Whether an order keeps within the cap, and begins nothing backward that it has not run forward."""
    live, begun = 0, set()
    for kind, stage, micro_batch in order:
        live += 1 if kind == F else -1
        if kind == F:
            begun.add((stage, micro_batch))
        elif (stage, micro_batch) not in begun:
            return False
        if live > cap:
            return False
    return True


@pytest.mark.parametrize("cap", [2, 3, 4])
@pytest.mark.parametrize("costs", [COSTS, StageCosts(attention=1, ffn=0.7, transfer=1.1, tail=0.3)])
def test_as_every_order_tried(cap: int, costs: StageCosts) -> None:
    """One layer and two micro-batches: ports never matter, so both are the same."""
    placement = ring(1, 1)
    workload = Workload.uniform(placement, costs, num_micro_batches=2)
    expected = every_order(placement, 2, cap, costs)
    assert least_makespan(workload, cap, below=expected + 1e-6) == pytest.approx(expected)
    assert least_makespan(workload, cap, below=expected) is None


@pytest.mark.parametrize(
    "layers, p, n, cap, optimum",
    [
        (1, 1, 3, 3, 13.0),
        (2, 1, 3, 4, 29.0),
        (2, 1, 5, 4, 44.0),
        (2, 2, 4, 4, 27.0),
        (4, 2, 3, 4, 58.0),
        (4, 2, 8, 5, 104.0),
    ],
)
def test_builders_are_near_the_optimum(layers: int, p: int, n: int, cap: int, optimum: float) -> None:
    """Within 5 %, where the optimum is up to 21 % above the bound of the cap."""
    workload = Workload.uniform(ring(layers, p), COSTS, num_micro_batches=n)
    assert lower_bounds(workload, max_live=cap).cap <= optimum
    assert least_makespan(workload, cap, below=optimum + 1e-6) == optimum
    schedule = builders.build("interleaved-1f1b", ring(layers, p), num_micro_batches=n, costs=COSTS, max_live=cap)
    assert optimum <= simulate(schedule, COSTS).makespan <= 1.05 * optimum


def test_what_is_too_large_or_of_another_kind() -> None:
    workload = Workload.uniform(ring(4, 2), COSTS, num_micro_batches=8)
    with pytest.raises(ValueError, match="more than 100 states"):
        least_makespan(workload, 8, below=1000, most_states=100)
    split = Workload.uniform(ring(1, 1), COSTS, num_micro_batches=2, split_backward=True)
    with pytest.raises(ValueError, match="only whole backwards"):
        least_makespan(split, 2, below=1000)
