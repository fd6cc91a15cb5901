"""Problems and allocations that several tests use."""

from __future__ import annotations

from typing import Any

from megatron_disagmoe.planner.allocation import Allocation, Job, NodeLayout
from megatron_disagmoe.planner.cluster_import import load_cluster
from megatron_disagmoe.planner.cluster_spec import Cluster
from megatron_disagmoe.planner.model_import import load_model
from megatron_disagmoe.planner.problem import Problem
from megatron_disagmoe.planner.space import Space
from megatron_disagmoe.planner.states import state_level


def problem(
    model: str = "mixtral-8x7b",
    cluster: str | Cluster = "h800-16x8",
    *,
    sequence: int = 4096,
    batch: int = 1024,
    space: Space | None = None,
    bytes_per_parameter: int = 18,
    **job: Any,
) -> Problem:
    """A shipped model on a cluster."""
    machines = load_cluster(cluster) if isinstance(cluster, str) else cluster
    dtype = machines.pools[0].gpu.dtype
    return Problem(
        model=load_model(model),
        cluster=machines,
        job=Job(sequence, batch, **job),
        space=space or Space(),
        state=state_level(dtype, bytes_per_parameter),
    )


def allocation(**changes: Any) -> Allocation:
    """Two groups a side of 8 and 8 GPUs on separate nodes."""
    sizes: dict[str, Any] = {
        "attention_groups": 2,
        "ffn_groups": 2,
        "attention_ranks": 8,
        "ffn_ranks": 8,
        "nodes": NodeLayout.SEPARATE,
        "nic_split": 3,
        "group_size": 8,
    }
    return Allocation(**(sizes | changes))
