"""What a step takes beside its pipeline: reducing gradients, the optimizer's step, gathering weights.

They follow the last backward (``--overlap-grad-reduce`` is not for AF-pipe), on both sides at once. A reduction over d
ranks moves (d - 1) / d of the gradients and as much of the weights (reduce-scatter, then all-gather; without the
distributed optimizer an all-reduce, which moves the gradients twice). Ranks on one node reduce among themselves first,
so that each node sends each of its different parameters once; where the spine is oversubscribed, what climbs to it
may take longer than that (``rings``).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from megatron_disagmoe.planner.allocation import NodeLayout
from megatron_disagmoe.planner.arrays import Bools, Floats, Ints
from megatron_disagmoe.planner.links import Links
from megatron_disagmoe.planner.problem import Problem
from megatron_disagmoe.planner.rings import spine_load
from megatron_disagmoe.planner.space import LAYOUTS, Candidates
from megatron_disagmoe.planner.timing import Timer
from megatron_disagmoe.planner.traffic import nvlink_rate


@dataclass(frozen=True)
class Parameters:
    """Of each candidate: parameters on the fullest GPU of either side and over how many ranks they are copied."""

    attention: Floats
    ffn: Floats
    attention_copies: Floats
    ffn_copies: Floats


def parameters_of(problem: Problem, candidates: Candidates) -> Parameters:
    """Parameters per GPU."""
    c, tables = candidates, problem.attention
    layers = -(-problem.num_layers // c.ffn_groups)
    experts = layers * problem.model.moe.num_experts * problem.model.num_expert_parameters
    return Parameters(
        attention=tables.parameters_most[c.cut, c.attention_groups - 1],
        ffn=experts / (c.ffn_ranks * c.expert_tensor_parallel),
        attention_copies=(c.attention_ranks * c.replicas * tables.context_parallel[c.cut]).astype(np.float64),
        ffn_copies=c.replicas.astype(np.float64),
    )


def shard(copies: Floats, *, distributed: bool) -> Floats:
    """Over how many ranks the optimizer's state is shared out."""
    return copies if distributed else np.ones_like(copies)


def synchronise_seconds(
    problem: Problem, candidates: Candidates, links: Links, *, attention: Floats | None = None
) -> Floats:
    """Seconds after the pipeline, and what else a step takes.

    ``attention``: parameters on the fullest attention GPU, where layers do not go round the groups in turn.
    """
    c, state, distributed = candidates, problem.state, problem.space.distributed_optimizer
    p = parameters_of(problem, candidates)
    if attention is not None:
        p = replace(p, attention=attention)
    a_pool, f_pool = problem.attention_pool, problem.ffn_pool
    per_parameter = state.gradient + (state.weight if distributed else state.gradient)
    a_moved = p.attention * per_parameter * (p.attention_copies - 1) / p.attention_copies
    f_moved = p.ffn * per_parameter * (p.ffn_copies - 1) / p.ffn_copies
    a_different, a_inside = _different(problem, candidates, links, p.attention_copies)
    a_rate, f_rate = problem.node_rates()
    a_off = np.where(a_inside, 0.0, a_moved * a_different)
    f_off = f_moved * links.ffn_per_node
    a_spine, f_spine = _spine_loads(problem, candidates)
    apart = LAYOUTS.index(NodeLayout.SEPARATE)
    together = np.maximum(a_off + f_off, a_off * a_spine + f_off * f_spine) / a_rate
    side_by_side = np.maximum(a_off * np.maximum(1, a_spine) / a_rate, f_off * np.maximum(1, f_spine) / f_rate)
    network = np.where(c.layout == apart, side_by_side, together)
    nvlink = np.maximum(a_moved / nvlink_rate(a_pool), f_moved / nvlink_rate(f_pool))
    bytes_per_parameter = 2 * state.total
    a_step = Timer(a_pool.gpu).memory(p.attention / shard(p.attention_copies, distributed=distributed))
    f_step = Timer(f_pool.gpu).memory(p.ffn / shard(p.ffn_copies, distributed=distributed))
    reduced = np.maximum(network, nvlink)
    return reduced + bytes_per_parameter * np.maximum(a_step, f_step) + problem.cluster.step_overhead_s


def _spine_loads(problem: Problem, candidates: Candidates) -> tuple[Floats, Floats]:
    """``rings.spine_load`` of either side's reduction. Of an FFN side every node of a replica holds other experts."""
    c, network = candidates, problem.cluster.network
    a_width, f_width = problem.attention_pool.gpus_per_node, problem.ffn_pool.gpus_per_node
    a_group = c.attention_ranks * problem.attention.gpus_per_rank[c.cut]
    f_group = c.ffn_ranks * c.expert_tensor_parallel
    a_replica, f_replica = a_group * c.attention_groups, f_group * c.ffn_groups
    apart, spread = (c.layout == LAYOUTS.index(layout) for layout in (NodeLayout.SEPARATE, NodeLayout.SPREAD))
    blocks = np.where(spread, 1, np.gcd(c.attention_groups, c.ffn_groups))

    def load(width: int, gpus: Ints, alike: Ints) -> Floats:
        """``gpus``: of one replica; small replicas share nodes, which are then all alike."""
        span = _up(gpus, width)
        replicas = np.where(gpus < width, _up(c.replicas, np.maximum(1, width // gpus)), c.replicas)
        return spine_load(network, span=span, alike=np.minimum(alike, span), replicas=replicas)

    a_gpus = np.where(apart, a_replica, a_replica + f_replica)
    a_alike = np.where(apart, _up(a_group, a_width), _up(a_gpus // blocks, a_width))
    f_gpus = np.where(apart, f_replica, a_replica + f_replica)
    return load(a_width, a_gpus, a_alike), load(f_width, f_gpus, np.ones_like(f_gpus))


def _up(number: Ints, by: Ints | int) -> Ints:
    return -(-number // by)


def _different(problem: Problem, candidates: Candidates, links: Links, copies: Floats) -> tuple[Floats, Bools]:
    """Different attention parameter shards on a node, and whether all copies of one lie on that node."""
    c, tables = candidates, problem.attention
    tp = tables.gpus_per_rank[c.cut] / tables.context_parallel[c.cut]
    spread = c.layout == LAYOUTS.index(NodeLayout.SPREAD)
    group_gpus = c.attention_ranks * tables.gpus_per_rank[c.cut]
    common = np.gcd(c.attention_groups, c.ffn_groups)
    paired = c.layout == LAYOUTS.index(NodeLayout.PAIRED)
    groups = np.ceil(links.attention_per_node / group_gpus)
    groups = np.where(paired, np.maximum(groups, c.attention_groups // common), groups)
    groups = np.where(spread, c.attention_groups, groups)
    different = np.minimum(links.attention_per_node, groups * tp)
    return different, links.attention_per_node / different >= copies
