"""Step time against live activations: the best order under one cap after the other, for every way to save memory.

Four ways ("levers"):

``plain``          every activation is kept from forward to backward;
``recompute-ffn``  FFN stages keep their input and run their forward again before backward;
``recompute``      attention stages too;
``re-dispatch``    FFN stages keep nothing: their input is dispatched again, and their forward run again.

A cap counts activations, not bytes: with recomputation each of them is smaller, with re-dispatch FFN groups hold almost
none. What an activation weighs is the planner's business.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from megatron_disagmoe.builders.front import build
from megatron_disagmoe.builders.search import least_live
from megatron_disagmoe.schedules.actions import Placement, Schedule, Side
from megatron_disagmoe.schedules.liveness import peak_live
from megatron_disagmoe.schedules.orders import Orders
from megatron_disagmoe.simulator.bounds import Workload
from megatron_disagmoe.simulator.costs import StageCosts
from megatron_disagmoe.simulator.simulate import simulate_orders
from megatron_disagmoe.simulator.step_bound import step_bound

PLAIN, RECOMPUTE_FFN, RECOMPUTE, REDISPATCH = "plain", "recompute-ffn", "recompute", "re-dispatch"
LEVERS = (PLAIN, RECOMPUTE_FFN, RECOMPUTE, REDISPATCH)


@dataclass(frozen=True)
class Point:
    """The best order found under one cap.

    ``bound``: no order within the cap is faster.
    ``live_attention``, ``live_ffn``: the most activations alive at once on a group of either side.
    """

    lever: str
    max_live: int
    makespan: float
    bound: float
    live_attention: int
    live_ffn: int

    def as_json(self) -> dict[str, object]:
        """All of it, and how far above the bound it is."""
        return {**dataclasses.asdict(self), "makespan_over_bound": self.makespan / self.bound}


def default_caps(placement: Placement, *, number: int = 9) -> list[int]:
    """Caps from the least possible to 4 L, evenly on a logarithmic scale."""
    least, most = least_live(placement), max(4 * placement.num_layers, least_live(placement))
    return sorted({round(least * (most / least) ** (step / (number - 1))) for step in range(number)})


def frontier(
    placement: Placement,
    *,
    kind: str,
    num_micro_batches: int,
    costs: StageCosts,
    caps: Sequence[int],
    levers: Sequence[str] = LEVERS,
    order_messages: bool = False,
) -> Iterator[Point]:
    """Points lever by lever, the lowest cap first; a higher cap never makes a step slower.

    ``order_messages``: as ``build`` has it.

    Raises:
        ValueError: for a cap that no order can meet, or an unknown lever.
    """
    unknown = [lever for lever in levers if lever not in LEVERS]
    if unknown:
        raise ValueError(f"there is no lever {unknown[0]!r}; choose among {', '.join(LEVERS)}")
    for lever in levers:
        changed = _costs(costs, lever)
        best: Point | None = None
        for cap in sorted(caps):
            schedule = build(
                kind,
                placement,
                num_micro_batches=num_micro_batches,
                costs=changed,
                max_live=cap,
                redispatch=lever == REDISPATCH,
                order_messages=order_messages,
            )
            point = _point(schedule, changed, lever, cap)
            if best is not None and best.makespan <= point.makespan:  # what keeps a lower cap keeps this one too
                point = dataclasses.replace(best, max_live=cap, bound=min(point.bound, best.makespan))
            best = point
            yield point


def _costs(costs: StageCosts, lever: str) -> StageCosts:
    if lever == PLAIN:
        return costs
    attention = 1.0 if lever == RECOMPUTE else costs.recompute_attention
    return dataclasses.replace(costs, recompute_attention=attention, recompute_ffn=1.0)


def _point(schedule: Schedule, costs: StageCosts, lever: str, cap: int) -> Point:
    orders, live = Orders.of(schedule), peak_live(schedule)
    return Point(
        lever=lever,
        max_live=cap,
        makespan=simulate_orders(orders, costs).makespan,
        bound=step_bound(Workload.of(orders, costs), max_live=cap),
        live_attention=max(most for group, most in live.items() if group.side is Side.A),
        live_ffn=max(most for group, most in live.items() if group.side is Side.F),
    )
