"""AF-pipe: allocations from the planner's search, schedules from the builders, both on the event engine.

By default everything is allowed: one copy per rank or node, split backward, unequal depths, fewer layers beside the
output layer, tensor and context parallelism.

Simplifications: those of the planner (docs/planner.md). Communication takes ``af_communication_sms`` of the SMs all the
time, where that isn't 0.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from megatron_disagmoe.planner.allocation import Job, NodeLayout
from megatron_disagmoe.planner.cluster_spec import Cluster
from megatron_disagmoe.planner.evaluate import allocation_of, evaluate
from megatron_disagmoe.planner.layered_costs import LayeredCosts
from megatron_disagmoe.planner.planning import Request, plan
from megatron_disagmoe.planner.rerank import Ranked
from megatron_disagmoe.planner.space import Space
from megatron_disagmoe.reproduction.systems.choose import Task
from megatron_disagmoe.reproduction.systems.result import Result
from megatron_disagmoe.schedules.orders import Orders
from megatron_disagmoe.simulator.bounds import Workload, lower_bounds
from megatron_disagmoe.simulator.simulate import durations, simulate_orders

#: Everything that the planner knows, but the order without any overlap.
OUR_SPACE = Space(schedules=("interleaved-1f1b", "split-backward"))


@dataclass(frozen=True)
class AfResult(Result):
    """``bound_seconds``: no schedule of this allocation is faster; ``least_bound``: nor of any looked at."""

    bound_seconds: float = 0.0
    least_bound: float = 0.0
    ranked: Ranked | None = None


def slowed_cluster(cluster: Cluster, sms: float) -> Cluster:
    """GPUs whose compute has the rest of the SMs."""
    if sms == 0:
        return cluster
    pools = []
    for pool in cluster.pools:
        was = pool.gpu.calibration
        factors = {"attention": was.attention / (1 - sms), "ffn": was.ffn / (1 - sms)}
        gpu = pool.gpu.model_copy(update={"calibration": was.model_copy(update=factors)})
        pools.append(pool.model_copy(update={"gpu": gpu}))
    return cluster.model_copy(update={"pools": tuple(pools)})


def request_of(task: Task, space: Space, keep: int) -> Request:
    """What the planner is asked."""
    c = task.constants
    cluster = slowed_cluster(task.cluster, c.af_communication_sms)
    job = Job(task.sequence, task.batch, c.micro_batch_size, task.imbalance)
    space = dataclasses.replace(space, bytes_per_parameter=(c.bytes_per_parameter,))
    return Request(task.model, cluster, job, space, keep)


def best_af(task: Task, *, space: Space = OUR_SPACE, keep: int = 3) -> AfResult | None:
    """What the planner finds, trying its ``keep`` best shapes and what is near them; None where nothing fits."""
    outcome = plan(request_of(task, space, keep))
    if not outcome.ranked:
        return None
    every = [one.evaluation for one in outcome.ranked]
    for found in (found for level in outcome.levels for found in level.found):
        every += [
            evaluate(found.problem, allocation_of(found.problem, found.candidates, at))
            for at in range(len(found.seconds))
        ]
    least = min(each.fill_bound + each.synchronise_seconds for each in every)
    return result_of(task, outcome.ranked[0], least_bound=least)


def without_network(costs: LayeredCosts) -> LayeredCosts:
    """The same stages on a network that takes no time."""
    return dataclasses.replace(costs, transfer=0.0, combine=0.0, lane=0.0)


def result_of(task: Task, ranked: Ranked, *, least_bound: float) -> AfResult:
    """A ranked allocation as a result."""
    evaluation = ranked.evaluation
    orders, costs = Orders.of(ranked.schedule), evaluation.costs
    free = simulate_orders(orders, without_network(costs)).makespan
    seconds = durations(orders, costs)
    busiest = max(
        float(seconds[start:end].sum()) for start, end in zip(orders.bounds[:-1], orders.bounds[1:], strict=True)
    )
    bound = lower_bounds(Workload.of(orders, costs)).fill + evaluation.synchronise_seconds
    a = evaluation.allocation
    return AfResult(
        system="af-pipe",
        step_seconds=ranked.step_seconds,
        pipeline_seconds=ranked.pipeline_seconds,
        exposed_seconds=ranked.pipeline_seconds - free,
        bubble_seconds=free - busiest,
        peak_bytes=max(ranked.attention.total, ranked.ffn.total),
        tokens=task.tokens,
        num_gpus=task.cluster.num_gpus,
        choice={
            "attention": f"{a.attention_groups} x {a.attention_ranks}",
            "ffn": f"{a.ffn_groups} x {a.ffn_ranks}",
            "replicas": a.replicas,
            "tensor_parallel": a.tensor_parallel,
            "context_parallel": a.context_parallel,
            "layout": a.nodes.value,
            "attention_nics": a.attention_nics_per_node if a.nodes is not NodeLayout.SEPARATE else None,
            "dispatch": a.dispatch,
            "schedule": a.schedule,
            "recompute": f"{a.recompute_attention.label}/{a.recompute_ffn.label}",
            "redispatch": a.redispatch,
            "micro_batches": evaluation.num_micro_batches,
            "max_live": ranked.max_live,
        },
        bound_seconds=bound,
        least_bound=least_bound,
        ranked=ranked,
    )
