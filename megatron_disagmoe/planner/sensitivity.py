"""How the best step time moves with machine and constraints, and what would make an impossible plan possible.

Every row is a search of its own, by the analytic step time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from megatron_disagmoe.planner.activations import Recompute
from megatron_disagmoe.planner.cluster_spec import Cluster
from megatron_disagmoe.planner.planning import LevelSearch, Progress, Request, best_analytic
from megatron_disagmoe.planner.problem import divisors
from megatron_disagmoe.planner.space import Space
from megatron_disagmoe.planner.states import state_levels


@dataclass(frozen=True)
class Variation:
    """A changed request and its best analytic step time, None where nothing fits."""

    change: str
    seconds: float | None


def _seconds(request: Request) -> float | None:
    try:
        found: LevelSearch | None = best_analytic(request)
    except ValueError:
        return None
    return found.seconds if found else None


def _with_pools(cluster: Cluster, change: Callable[[Any], dict[str, Any]]) -> Cluster:
    pools = tuple(pool.model_copy(update=change(pool)) for pool in cluster.pools)
    return cluster.model_copy(update={"pools": pools})


def _nics(cluster: Cluster, factor: float) -> Cluster:
    return _with_pools(cluster, lambda pool: {"nics_gbit_per_s": tuple(x * factor for x in pool.nics_gbit_per_s)})


def _nvlink(cluster: Cluster, factor: float) -> Cluster:
    return _with_pools(cluster, lambda pool: {"nvlink_gb_per_s": pool.nvlink_gb_per_s * factor})


def _memory(cluster: Cluster, factor: float) -> Cluster:
    return _with_pools(
        cluster, lambda pool: {"gpu": pool.gpu.model_copy(update={"memory_gb": pool.gpu.memory_gb * factor})}
    )


def _nodes(cluster: Cluster, change: Callable[[int], int]) -> Cluster:
    return _with_pools(cluster, lambda pool: {"num_nodes": change(pool.num_nodes)})


def variations(request: Request) -> Iterator[tuple[str, Request]]:
    """Changes of machine and constraints worth knowing about."""
    cluster, space = request.cluster, request.space

    def machine(changed: Cluster) -> Request:
        return replace(request, cluster=changed)

    if any(pool.nics_gbit_per_s for pool in cluster.pools):
        for factor in (0.5, 2.0):
            yield f"NICs x {factor:g}", machine(_nics(cluster, factor))
    for factor in (0.5, 2.0):
        yield f"NVLink x {factor:g}", machine(_nvlink(cluster, factor))
    for factor in (0.9, 1.25):
        yield f"GPU memory x {factor:g}", machine(_memory(cluster, factor))
    if all(pool.num_nodes > 1 for pool in cluster.pools):
        yield "one node less", machine(_nodes(cluster, lambda count: count - 1))
    if cluster.network.oversubscription == 1 and cluster.num_nodes > 1:
        network = cluster.network.model_copy(update={"oversubscription": 4.0, "nodes_per_leaf": 1})
        yield "spine oversubscribed 4:1, leaves of one node", machine(cluster.model_copy(update={"network": network}))
    job = request.job
    yield "twice the batch", replace(request, job=replace(job, global_batch_size=2 * job.global_batch_size))
    yield "busiest FFN rank 1.3 x the mean", replace(request, job=replace(job, imbalance=job.imbalance * 1.3))
    for change, constrained in _constraints(space):
        yield change, replace(request, space=constrained)
    for level in state_levels(cluster.pools[0].gpu.dtype):
        if space.bytes_per_parameter is None:
            fixed = replace(space, bytes_per_parameter=(level.total,))
            yield f"{level.total} bytes a parameter", replace(request, space=fixed)


def _constraints(space: Space) -> Iterator[tuple[str, Space]]:
    """Each constraint the other way round, and all choices free where some are fixed."""
    for name, on, off in (
        ("whole_nodes", "whole nodes only", "nodes may be half used"),
        ("asymmetric", "unequal depths too", "equal depths only"),
        ("distributed_optimizer", "with a distributed optimizer", "no distributed optimizer"),
    ):
        is_on = getattr(space, name)
        changed: dict[str, Any] = {name: not is_on}
        yield off if is_on else on, replace(space, **changed)
    free = Space(
        asymmetric=space.asymmetric,
        whole_nodes=space.whole_nodes,
        distributed_optimizer=space.distributed_optimizer,
        bytes_per_parameter=space.bytes_per_parameter,
    )
    if free != space:
        yield "every other choice free", free


def sensitivity(request: Request, *, progress: Progress | None = None) -> list[Variation]:
    """The best step time under each change."""
    rows: list[Variation] = []
    every = list(variations(request))
    for change, changed in every:
        if progress:
            progress(f"sensitivity, {change}", len(rows) / len(every), len(rows))
        rows.append(Variation(change, _seconds(changed)))
    return rows


@dataclass(frozen=True)
class Diagnosis:
    """Why nothing fits: what parameters need against what there is; and changes that help, the smallest first."""

    why: tuple[str, ...]
    remedies: tuple[Variation, ...]


def diagnose(request: Request) -> Diagnosis:
    """Why ``request`` has no plan, and what would give it one."""
    return Diagnosis(tuple(_why(request)), tuple(_remedies(request)))


def _why(request: Request) -> Iterator[str]:
    model, cluster, job = request.model, request.cluster, request.job
    least = request.levels()[-1]
    states = model.num_parameters * least.total / 1e9
    usable = sum(pool.num_gpus * pool.gpu.usable_bytes for pool in cluster.pools) / 1e9
    yield (
        f"{model.num_parameters / 1e9:.4g} billion parameters at {least.total} bytes need {states:,.0f} GB; "
        f"{cluster.num_gpus} GPUs have {usable:,.0f} GB to use"
    )
    if states < usable:
        yield (
            f"that leaves {(usable - states) / cluster.num_gpus:.1f} GB a GPU for activations of {job.sequence_length} "
            f"tokens x {job.micro_batch_size}, buffers, copies of dense parameters on every attention rank, and for "
            f"sizes that do not divide"
        )
    if cluster.num_gpus < 2:
        yield "two sides need at least two GPUs"


def _remedies(request: Request) -> Iterator[Variation]:
    """Each kind of change at its smallest; those that do not help are left out."""
    free = Space()
    space = request.space
    levers: dict[str, Any] = {
        "recompute_attention": tuple(Recompute),
        "ffn_levers": free.ffn_levers,
        "tensor_parallel": free.tensor_parallel,
        "context_parallel": free.context_parallel,
        "expert_tensor_parallel": free.expert_tensor_parallel,
        "distributed_optimizer": True,
        "asymmetric": True,
        "whole_nodes": False,
        "bytes_per_parameter": None,
    }
    changed = {name: value for name, value in levers.items() if getattr(space, name) != value}
    for name, value in changed.items():
        yield from _if_it_helps(
            f"allow every {name.replace('_', ' ')}", replace(request, space=replace(space, **{name: value}))
        )
    if len(changed) > 1:
        yield from _if_it_helps("allow every lever", replace(request, space=replace(space, **changed)))
    job = request.job
    for size in reversed(divisors(job.micro_batch_size)[:-1]):
        remedy = _if_it_helps(f"--micro-batch-size {size}", replace(request, job=replace(job, micro_batch_size=size)))
        if found := list(remedy):
            yield from found
            break
    factor = _least_factor(lambda f: _seconds(replace(request, cluster=_memory(request.cluster, f))) is not None)
    if factor:
        more = replace(request, cluster=_memory(request.cluster, factor))
        gpu = request.cluster.pools[0].gpu
        yield Variation(f"GPUs with {gpu.memory_gb * factor:.0f} GB instead of {gpu.memory_gb:g}", _seconds(more))
    nodes = request.cluster.num_nodes
    factor = _least_factor(
        lambda f: (
            _seconds(replace(request, cluster=_nodes(request.cluster, lambda count: math.ceil(count * f)))) is not None
        )
    )
    if factor:
        more_nodes = _nodes(request.cluster, lambda count: math.ceil(count * factor))
        label = f"{more_nodes.num_nodes} nodes instead of {nodes}"
        yield Variation(label, _seconds(replace(request, cluster=more_nodes)))


def _if_it_helps(change: str, request: Request) -> Iterator[Variation]:
    seconds = _seconds(request)
    if seconds is not None:
        yield Variation(change, seconds)


def _least_factor(works: Callable[[float], bool]) -> float | None:
    """The least factor, to about 3%, up to 64; None where even that does not help."""
    high = 1.0
    while not works(high):
        high *= 2
        if high > 64:
            return None
    low = high / 2
    for _ in range(5):
        middle = (low + high) / 2
        low, high = (low, middle) if works(middle) else (middle, high)
    return high
