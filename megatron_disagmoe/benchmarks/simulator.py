"""How fast the event engine simulates schedules, on one core.

An action is a compute action or a transfer. ``simulate`` is all that a search pays for one order: deriving the
transfers, running every event; ``read`` is what turning a ``Schedule`` into arrays costs before that.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

from megatron_disagmoe.builders.front import build
from megatron_disagmoe.schedules.actions import Placement
from megatron_disagmoe.schedules.orders import Orders
from megatron_disagmoe.simulator.costs import StageCosts
from megatron_disagmoe.simulator.simulate import simulate_orders

#: Groups a side, layers, micro-batches.
SIZES = ((4, 32, 64), (8, 94, 256), (32, 128, 256))
#: What the project asks for.
LEAST_PER_SECOND = 1_000_000


@dataclass(frozen=True)
class Row:
    """One schedule simulated; seconds are the shortest of several tries."""

    groups: int
    layers: int
    micro_batches: int
    lanes: bool
    compute_actions: int
    transfers: int
    simulate_s: float
    read_s: float

    @property
    def actions(self) -> int:
        """Everything that starts and ends."""
        return self.compute_actions + self.transfers

    def as_json(self) -> dict[str, object]:
        """Every figure and rate."""
        whole = self.simulate_s + self.read_s
        return {
            **asdict(self),
            "actions_per_second": self.actions / self.simulate_s,
            "actions_per_second_with_reading": self.actions / whole,
            "compute_actions_per_second": self.compute_actions / self.simulate_s,
            "compute_actions_per_second_with_reading": self.compute_actions / whole,
            "least_per_second": LEAST_PER_SECOND,
            "holds": self.actions / whole >= LEAST_PER_SECOND,
        }


def measure(*, repeats: int = 7) -> list[Row]:
    """Interleaved 1F1B of every size, without lanes and with them."""
    rows = []
    for p, layers, n in SIZES:
        for lane in (0.0, 0.25):
            placement = Placement.round_robin(num_layers=layers, num_attention_groups=p, num_ffn_groups=p)
            costs = StageCosts(attention=1.0, ffn=1.0, transfer=0.5, lane=lane)
            schedule = build("interleaved-1f1b", placement, num_micro_batches=n, costs=costs, group_size=4 * p)
            orders = Orders.of(schedule)
            run = simulate_orders(orders, costs)  # compiles, and warms the caches
            rows.append(
                Row(
                    groups=2 * p,
                    layers=layers,
                    micro_batches=n,
                    lanes=lane > 0,
                    compute_actions=len(orders),
                    transfers=len(run.transfers),
                    simulate_s=_shortest(lambda: simulate_orders(orders, costs), repeats),  # noqa: B023
                    read_s=_shortest(lambda: Orders.of(schedule), repeats),  # noqa: B023
                )
            )
    return rows


def _shortest(work: Callable[[], object], repeats: int) -> float:
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return min(seconds)
