"""How groups lie on nodes, in closed form: what share of each transfer leaves its node.

Legend: pA, pF groups, M, N ranks of a group, R replicas, a = TP CP GPUs of an attention rank, e = ETP GPUs of an FFN
rank, w GPUs of a node. Every function takes integers or arrays of them.

Groups that share nodes form *blocks*: one block is everything (SPREAD), or A_g and F_g, g modulo c = gcd(pA, pF)
(PAIRED; layer i lies in block i mod c, so M2N stays inside a block and N2M goes to the next one). A block that fills m
nodes keeps 1/m of its own traffic inside nodes, since each node holds 1/m of either side's ranks; b blocks that fit one
node keep all of it, and b - 1 of b transfers to the next block.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from megatron_disagmoe.planner.allocation import NodeLayout
from megatron_disagmoe.planner.arrays import Bools, Floats, Ints


@dataclass(frozen=True)
class Shapes:
    """Sizes of allocations, one entry each."""

    attention_groups: Ints
    ffn_groups: Ints
    attention_ranks: Ints
    ffn_ranks: Ints
    replicas: Ints
    attention_gpus_per_rank: Ints
    ffn_gpus_per_rank: Ints

    @property
    def attention_group_gpus(self) -> Ints:
        return self.attention_ranks * self.attention_gpus_per_rank

    @property
    def ffn_group_gpus(self) -> Ints:
        return self.ffn_ranks * self.ffn_gpus_per_rank


@dataclass(frozen=True)
class Geometry:
    """What a layout makes of ``Shapes``; entries where ``fits`` is false mean nothing.

    ``attention_per_node``, ``ffn_per_node``: GPUs of each side on one of its nodes. ``m2n_off``, ``n2m_off``,
    ``lane_off``: share of a transfer that leaves its node. ``ffn_nodes``: nodes of one FFN group, 0 where they hold
    different numbers of its ranks. ``m2n_span``, ``n2m_span``: nodes that a transfer's two ends lie on.
    """

    fits: Bools
    attention_nodes: Ints
    ffn_nodes_in_all: Ints
    attention_per_node: Floats
    ffn_per_node: Floats
    m2n_off: Floats
    n2m_off: Floats
    lane_off: Floats
    ffn_nodes: Ints
    m2n_span: Floats
    n2m_span: Floats


def _up(a: ArrayLike, b: ArrayLike) -> Ints:
    return -(-np.asarray(a) // np.asarray(b))


def separate(
    shapes: Shapes,
    *,
    attention_gpus_per_node: int,
    ffn_gpus_per_node: int,
    attention_nodes: int,
    ffn_nodes: int,
    one_pool: bool,
    whole_nodes: bool,
) -> Geometry:
    """The two sides on nodes of their own. ``one_pool``: both take nodes from the same pool.

    Where groups fill nodes and depths are equal, the nodes of A_g and F_g are neighbours; else all attention nodes come
    first.
    """
    s = shapes
    a_group, f_group = s.attention_group_gpus, s.ffn_group_gpus
    a_all, f_all = s.replicas * s.attention_groups * a_group, s.replicas * s.ffn_groups * f_group
    a_nodes, f_nodes = _up(a_all, attention_gpus_per_node), _up(f_all, ffn_gpus_per_node)
    fits = (attention_gpus_per_node % s.attention_gpus_per_rank == 0) & (ffn_gpus_per_node % s.ffn_gpus_per_rank == 0)
    if one_pool:
        fits &= a_nodes + f_nodes <= attention_nodes
    else:
        fits &= (a_nodes <= attention_nodes) & (f_nodes <= ffn_nodes)
    if whole_nodes:
        fits &= (a_all % attention_gpus_per_node == 0) & (f_all % ffn_gpus_per_node == 0)
    even = (f_group % ffn_gpus_per_node == 0) | (ffn_gpus_per_node % f_group == 0)
    one_node = attention_gpus_per_node % (s.attention_groups * a_group) == 0
    side_by_side = (a_group % attention_gpus_per_node == 0) & (f_group % ffn_gpus_per_node == 0)
    side_by_side &= s.attention_groups == s.ffn_groups
    near = _up(a_group, attention_gpus_per_node) + _up(f_group, ffn_gpus_per_node)
    span = np.where(side_by_side, near, a_nodes + f_nodes).astype(np.float64)
    ones = np.ones(np.shape(fits))
    return Geometry(
        fits=fits,
        attention_nodes=a_nodes,
        ffn_nodes_in_all=f_nodes,
        attention_per_node=np.minimum(a_all, attention_gpus_per_node).astype(np.float64),
        ffn_per_node=np.minimum(f_all, ffn_gpus_per_node).astype(np.float64),
        m2n_off=ones,
        n2m_off=ones,
        lane_off=np.where((s.attention_groups > 1) & ~one_node, 1.0, 0.0),
        ffn_nodes=np.where(even, _up(f_group, ffn_gpus_per_node), 0),
        m2n_span=span,
        n2m_span=span,
    )


def shared(shapes: Shapes, layout: NodeLayout, *, gpus_per_node: int, num_nodes: int, whole_nodes: bool) -> Geometry:
    """Both sides on the same nodes, in blocks."""
    s = shapes
    common = np.gcd(s.attention_groups, s.ffn_groups)
    blocks = np.ones_like(common) if layout is NodeLayout.SPREAD else common
    attention = s.attention_groups // blocks * s.attention_group_gpus
    ffn = s.ffn_groups // blocks * s.ffn_group_gpus
    block = attention + ffn
    many = block >= gpus_per_node  # a block fills nodes; otherwise a node holds blocks
    per_block = np.maximum(block // gpus_per_node, 1)
    per_node = np.clip(gpus_per_node // block, 1, s.replicas * blocks)
    nodes = np.where(many, s.replicas * blocks * per_block, _up(s.replicas * blocks, per_node))
    even = (block % gpus_per_node == 0) & (s.attention_ranks % per_block == 0) & (s.ffn_ranks % per_block == 0)
    tidy = (blocks % per_node == 0) | (per_node % blocks == 0)
    if whole_nodes:
        tidy &= (gpus_per_node % block == 0) & (s.replicas * blocks % per_node == 0)
    fits = np.where(many, even, tidy) & (nodes <= num_nodes)
    if layout is NodeLayout.PAIRED:
        fits &= common > 1  # one block is SPREAD
    inside = np.where(many, 1 - 1 / per_block, 0.0)
    between = np.where(many, 1.0, np.where(per_node >= blocks, 0.0, 1 / per_node))
    alone = blocks == 1
    span = np.where(many, per_block, 1).astype(np.float64)
    return Geometry(
        fits=fits,
        attention_nodes=nodes,
        ffn_nodes_in_all=nodes,
        attention_per_node=np.where(many, attention / per_block, attention * per_node),
        ffn_per_node=np.where(many, ffn / per_block, ffn * per_node),
        m2n_off=inside,
        n2m_off=np.where(alone, inside, between),
        lane_off=np.where(alone, 0.0, between),
        ffn_nodes=np.where(many, per_block, 1),
        m2n_span=span,
        n2m_span=np.where(alone | (between == 0), span, 2 * span),
    )
