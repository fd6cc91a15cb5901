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


def ideal_cluster(*, memory_gb: float = 80) -> Cluster:
    """Everything at peak, no latency, no overhead, memory infinitely fast."""
    cluster = load_cluster("h800-16x8")
    curve = ((1.0, 1.0),)
    curves: dict[str, Any] = {"forward": curve, "backward": curve}
    gpu = cluster.pools[0].gpu.model_dump()
    gpu |= {"stage_overhead_us": 0, "memory_bandwidth_gb_per_s": 1e15, "memory_gb": memory_gb}
    gpu["efficiency"] = {"gemm": curve, "grouped_gemm": curve, "attention": {128: curves}, "memory": 1.0}
    pool = cluster.pools[0].model_dump() | {"gpu": gpu}
    network = cluster.network.model_dump() | {"efficiency": 1.0, "latency_us": 0, "local_latency_us": 0}
    return Cluster.model_validate(cluster.model_dump() | {"pools": [pool], "network": network})
