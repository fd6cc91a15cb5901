"""Which process sits on which GPU: the node layout of an allocation, spelled out rank by rank.

Ranks are numbered as ``topology`` does: a block of ranks for every group, FFN groups first, the tail's attention group
last; inside a block by replica, then by number in the group, then by part (the TP CP or ETP GPUs of a rank).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from megatron_disagmoe.planner.allocation import Allocation, NodeLayout
from megatron_disagmoe.planner.cluster_spec import Cluster
from megatron_disagmoe.schedules.actions import Group, Side


class Seat(NamedTuple):
    """One process: its global rank, what it is, and where it sits. Nodes are numbered over the whole cluster."""

    rank: int
    group: Group
    replica: int
    number: int
    part: int
    node: int
    gpu: int


def seats(allocation: Allocation, cluster: Cluster, *, num_layers: int) -> tuple[Seat, ...]:
    """Every process of a run, by rank.

    Raises:
        ValueError: the layout does not give every rank a place of its own.
    """
    a = allocation
    gpus = (cluster.pools[a.attention_pool].gpus_per_node, cluster.pools[a.ffn_pool].gpus_per_node)
    if a.nodes is NodeLayout.SEPARATE:
        placed = dict(_separate(a, cluster, gpus))
    else:
        placed = dict(_shared(a, gpus[0]))
    taken: dict[int, int] = {}
    result = []
    for rank, (group, replica, index, part) in enumerate(_ranks(a, num_layers)):
        node = placed[group.side, group.index, replica, index, part]
        gpu = taken.get(node, 0)
        taken[node] = gpu + 1
        result.append(Seat(rank, group, replica, index, part, node, gpu))
    full = [node for node, count in taken.items() if count > max(gpus)]
    if full:
        raise ValueError(f"node {full[0]} would hold {taken[full[0]]} processes, it has {max(gpus)} GPUs")
    return tuple(result)


def _ranks(a: Allocation, num_layers: int) -> Iterator[tuple[Group, int, int, int]]:
    tail = a.placement(num_layers).attention[-1]
    order = [Group(Side.F, g) for g in range(a.ffn_groups)]
    order += [Group(Side.A, (tail + 1 + g) % a.attention_groups) for g in range(a.attention_groups)]
    for group in order:
        ranks, parts = _sizes(a, group.side)
        for replica in range(a.replicas):
            for index in range(ranks):
                for part in range(parts):
                    yield group, replica, index, part


def _sizes(a: Allocation, side: Side) -> tuple[int, int]:
    if side is Side.A:
        return a.attention_ranks, a.tensor_parallel * a.context_parallel
    return a.ffn_ranks, a.expert_tensor_parallel


_Place = tuple[tuple[Side, int, int, int, int], int]


def _separate(a: Allocation, cluster: Cluster, gpus: tuple[int, int]) -> Iterator[_Place]:
    """Each side fills nodes of its own, one group after the other."""
    a_group = a.attention_ranks * a.tensor_parallel * a.context_parallel
    f_group = a.ffn_ranks * a.expert_tensor_parallel
    one_pool = a.attention_pool == a.ffn_pool
    neighbours = a_group % gpus[0] == 0 and f_group % gpus[1] == 0 and a.attention_groups == a.ffn_groups
    first_node = [sum(pool.num_nodes for pool in cluster.pools[:index]) for index in range(len(cluster.pools))]
    a_start, f_start = first_node[a.attention_pool], first_node[a.ffn_pool]
    if one_pool and not neighbours:
        f_start += -(-a.attention_gpus // gpus[0])
    together = one_pool and neighbours
    pair = a_group // gpus[0] + f_group // gpus[1]
    for side, groups, start, size, node in (
        (Side.A, a.attention_groups, a_start, a_group, gpus[0]),
        (Side.F, a.ffn_groups, f_start, f_group, gpus[1]),
    ):
        ranks, parts = _sizes(a, side)
        for replica in range(a.replicas):
            for group in range(groups):
                before = (replica * groups + group) * size
                first = start + (replica * groups + group) * pair + (side is Side.F) * (a_group // gpus[0])
                for index in range(ranks):
                    for part in range(parts):
                        gpu = index * parts + part
                        at = first + gpu // node if together else start + (before + gpu) // node
                        yield (side, group, replica, index, part), at


def _shared(a: Allocation, gpus: int) -> Iterator[_Place]:
    """Blocks of groups on nodes; a block that fills nodes has an equal part of each of its groups on each."""
    blocks = int(np.gcd(a.attention_groups, a.ffn_groups)) if a.nodes is NodeLayout.PAIRED else 1
    size = a.num_gpus // (a.replicas * blocks)
    per_block, per_node = max(size // gpus, 1), max(gpus // size, 1)
    for side, groups in ((Side.A, a.attention_groups), (Side.F, a.ffn_groups)):
        ranks, parts = _sizes(a, side)
        for replica in range(a.replicas):
            for group in range(groups):
                block = replica * blocks + group % blocks
                first = block * per_block if size >= gpus else block // per_node
                for index in range(ranks):
                    for part in range(parts):
                        yield (side, group, replica, index, part), first + index * per_block // ranks
