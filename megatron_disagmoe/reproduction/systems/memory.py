"""Bytes on the fullest GPU of a co-located system, counted as the planner counts AF-pipe's."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from megatron_disagmoe.planner.rings import spine_load
from megatron_disagmoe.planner.states import StateBytes, attention_parameters
from megatron_disagmoe.planner.timing import Timer
from megatron_disagmoe.planner.traffic import node_nic_rate, nvlink_rate
from megatron_disagmoe.reproduction.systems.layer import Costs
from megatron_disagmoe.reproduction.systems.pipeline import Shape


@dataclass(frozen=True)
class Held:
    """Parameters on one pipeline rank's GPU: dense ones and routed experts."""

    dense: float
    experts: float


def held(costs: Costs, shape: Shape, sizes: list[int], *, copies: int) -> list[Held]:
    """Of every pipeline rank; ``copies`` 2: with its mirror's."""
    model = costs.job.model
    parameters = attention_parameters(model)
    cut = costs.job.tensor_parallel
    per_layer = parameters.cut / cut + parameters.whole
    experts = model.moe.num_experts * model.num_expert_parameters / costs.job.expert_parallel
    dense, routed = [0.0] * shape.ranks, [0.0] * shape.ranks
    start = 0
    for chunk, size in enumerate(sizes):
        rank = shape.rank_of(chunk)
        dense[rank] += float(per_layer[start : start + size].sum())
        routed[rank] += size * experts
        start += size
    dense[0] += parameters.embedding / cut
    last = shape.rank_of(shape.chunks - 1)
    dense[last] += float(per_layer[-1]) + parameters.final_norm
    dense[last] += parameters.output / cut if last or not parameters.tied else 0.0
    if copies == 2:
        dense = [a + b for a, b in zip(dense, reversed(dense), strict=True)]
        routed = [a + b for a, b in zip(routed, reversed(routed), strict=True)]
    return [Held(a, b) for a, b in zip(dense, routed, strict=True)]


def state_bytes(of: Held, state: StateBytes, *, dense_copies: int, expert_copies: int) -> float:
    """Weights and gradients whole, the optimizer's state shared out over the copies."""
    whole = state.weight + state.gradient
    dense = of.dense * (whole + state.optimizer / dense_copies)
    return dense + of.experts * (whole + state.optimizer / expert_copies)


def peak_bytes(
    costs: Costs,
    shape: Shape,
    sizes: list[int],
    live: list[dict[int, int]],
    *,
    state: StateBytes,
    replicas: int,
    copies: int,
) -> float:
    """On the fullest GPU, with what is reserved.

    Args:
        live: micro-batches of each of a rank's chunks that are alive (``pipeline.peak_live``), of every rank.
        copies: of the parameters on a rank.
    """
    starts = [sum(sizes[:chunk]) for chunk in range(len(sizes))]
    kept = [
        sum(layer.kept for layer in costs.layers[start : start + size])
        for start, size in zip(starts, sizes, strict=True)
    ]
    expert_copies = replicas * copies
    dense_copies = expert_copies * costs.job.expert_parallel // costs.job.tensor_parallel
    reserved = costs.job.cluster.pools[0].gpu.reserved_memory_gb * 1e9
    most = 0.0
    for rank, parameters in enumerate(held(costs, shape, sizes, copies=copies)):
        activations = sum(count * kept[chunk] for chunk, count in live[rank].items())
        has_tail = shape.chunks - 1 in live[rank]
        workspace = costs.workspace + (costs.tail_workspace if has_tail else 0.0)
        state_part = state_bytes(parameters, state, dense_copies=dense_copies, expert_copies=expert_copies)
        most = max(most, state_part + activations + workspace + costs.transport + reserved)
    return most


def synchronise_seconds(
    costs: Costs, parameters: list[Held], *, state: StateBytes, replicas: int, copies: int
) -> float:
    """Reducing gradients, the optimizer's step, gathering weights, after the pipeline as for AF-pipe.

    Dense parameters have a copy on each of a node's GPUs, which reduce over NVLink first, so a node sends each once.
    Copies of a stage are neighbours (Megatron counts pipeline ranks last), so that is how they climb to a spine.
    """
    job = costs.job
    pool = job.cluster.pools[0]
    expert_copies = replicas * copies
    dense_copies = expert_copies * job.expert_parallel // job.tensor_parallel
    per_parameter = state.gradient + state.weight
    nic = node_nic_rate(pool, job.cluster.network)
    span = np.array([-(-job.expert_parallel // pool.gpus_per_node)])
    network, repeated = job.cluster.network, np.array([expert_copies])
    dense_load = float(spine_load(network, span=span, alike=span, replicas=repeated)[0])
    expert_load = float(spine_load(network, span=span, alike=np.ones_like(span), replicas=repeated)[0])
    longest = 0.0
    for each in parameters:
        dense = each.dense * per_parameter * (dense_copies - 1) / dense_copies
        experts = each.experts * per_parameter * (expert_copies - 1) / expert_copies
        single = dense_copies * job.tensor_parallel <= pool.gpus_per_node
        dense_off, experts_off = 0.0 if single else dense * job.tensor_parallel, experts * pool.gpus_per_node
        off = max(dense_off + experts_off, dense_off * dense_load + experts_off * expert_load)
        step = float(Timer(pool.gpu).memory(each.dense / dense_copies + each.experts / expert_copies))
        longest = max(longest, max(off / nic, (dense + experts) / nvlink_rate(pool)) + 2 * state.total * step)
    return longest + job.cluster.step_overhead_s
