"""The strongest of all lower bounds on a step."""

from __future__ import annotations

from megatron_disagmoe.simulator.bounds import Workload, lower_bounds
from megatron_disagmoe.simulator.feed_bound import feed_bound
from megatron_disagmoe.simulator.nested_bound import nested_bound


def step_bound(workload: Workload, *, max_live: int | None = None) -> float:
    """No order of ``workload``, within ``max_live``, is faster.

    Raises:
        ValueError: where no order keeps within ``max_live``.
    """
    return max(lower_bounds(workload, max_live=max_live).cap, nested_bound(workload), feed_bound(workload))
