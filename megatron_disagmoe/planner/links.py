"""What joins the two sides of each candidate: layout on nodes, transfers, packing."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Self

import numpy as np

from megatron_disagmoe.planner.allocation import DISPATCH_MODES, NodeLayout
from megatron_disagmoe.planner.arrays import Bools, Floats, Ints
from megatron_disagmoe.planner.layout import Geometry, Shapes, separate, shared
from megatron_disagmoe.planner.problem import Problem
from megatron_disagmoe.planner.space import LAYOUTS, Candidates
from megatron_disagmoe.planner.traffic import Ends, rows_per_token, transfer_times, volumes


@dataclass(frozen=True)
class Links:
    """Of each candidate. ``m2n``, ``n2m``, ``lane``: seconds of a transfer; ``packing``: seconds of a layer.

    ``attention_buffers``, ``ffn_buffers``, ``lane_buffers``: bytes on a GPU of one M2N's rows, either side, and of a
    lane. ``attention_per_node``, ``ffn_per_node``: GPUs of each side on a node.
    """

    m2n: Floats
    n2m: Floats
    lane: Floats
    packing: Floats
    attention_buffers: Floats
    ffn_buffers: Floats
    lane_buffers: Floats
    attention_per_node: Floats
    ffn_per_node: Floats

    def take(self, which: Ints | Bools) -> Self:
        """Some of them."""
        return type(self)(*(getattr(self, field.name)[which] for field in fields(self)))


def shapes_of(problem: Problem, candidates: Candidates) -> Shapes:
    """The sizes that layouts look at."""
    c = candidates
    return Shapes(
        attention_groups=c.attention_groups,
        ffn_groups=c.ffn_groups,
        attention_ranks=c.attention_ranks,
        ffn_ranks=c.ffn_ranks,
        replicas=c.replicas,
        attention_gpus_per_rank=problem.attention.gpus_per_rank[c.cut],
        ffn_gpus_per_rank=c.expert_tensor_parallel,
    )


def geometry_of(problem: Problem, candidates: Candidates, layout: NodeLayout) -> Geometry:
    """How candidates that share one layout lie on nodes."""
    shapes = shapes_of(problem, candidates)
    a_pool, f_pool = problem.attention_pool, problem.ffn_pool
    whole = problem.space.whole_nodes
    if layout is NodeLayout.SEPARATE:
        return separate(
            shapes,
            attention_gpus_per_node=a_pool.gpus_per_node,
            ffn_gpus_per_node=f_pool.gpus_per_node,
            attention_nodes=a_pool.num_nodes,
            ffn_nodes=f_pool.num_nodes,
            one_pool=problem.one_pool,
            whole_nodes=whole,
        )
    return shared(shapes, layout, gpus_per_node=a_pool.gpus_per_node, num_nodes=a_pool.num_nodes, whole_nodes=whole)


def link(problem: Problem, candidates: Candidates, *, layout: int, dispatch: int) -> tuple[Candidates, Links]:
    """Candidates with this layout and dispatch mode that are possible, once for each NIC split worth trying."""
    kind = LAYOUTS[layout]
    if kind is not NodeLayout.SEPARATE and not problem.one_pool:
        return _none(candidates)
    candidates = candidates.with_(layout=layout, dispatch=dispatch, nics=0)
    geometry = geometry_of(problem, candidates, kind)
    fits = geometry.fits
    if DISPATCH_MODES[dispatch] == "per-node":
        fits &= geometry.ffn_nodes > 0
    if not fits.all():
        candidates, geometry = candidates.take(fits), _take(geometry, fits)
    if not len(candidates):
        return _none(candidates)
    splits = len(problem.nics) if kind is not NodeLayout.SEPARATE else 1
    linked = [links_of(problem, candidates.with_(nics=split), geometry) for split in range(splits)]
    if splits == 1:
        return candidates, linked[0]
    which, split = np.nonzero(_undominated(linked).T)
    chosen = candidates.take(which).with_(nics=split)
    stacked = {field.name: np.array([getattr(each, field.name) for each in linked]) for field in fields(Links)}
    return chosen, Links(**{name: column[split, which] for name, column in stacked.items()})


def _none(candidates: Candidates) -> tuple[Candidates, Links]:
    nobody = np.zeros(0)
    empty = candidates.take(np.zeros(0, np.int64))
    return empty, Links(*(nobody for _ in fields(Links)))


def _take(geometry: Geometry, which: Bools) -> Geometry:
    return Geometry(*(getattr(geometry, field.name)[which] for field in fields(Geometry)))


def _undominated(linked: list[Links]) -> Bools:
    """[split, candidate]: no other split is as quick for every transfer (of equals, the first)."""
    times = np.array([[each.m2n, each.n2m, each.lane] for each in linked])
    keep = np.ones((times.shape[0], times.shape[2]), np.bool_)
    for mine in range(len(times)):
        for other in range(len(times)):
            if other != mine:
                better = (times[other] <= times[mine]).all(axis=0)
                equal = (times[other] == times[mine]).all(axis=0)
                keep[mine] &= ~(better & (~equal | (other < mine)))
    return keep


def links_of(problem: Problem, candidates: Candidates, geometry: Geometry) -> Links:
    """Transfers of candidates that all have one dispatch mode and one layout."""
    c, model, job = candidates, problem.model, problem.job
    mode = DISPATCH_MODES[int(c.dispatch[0])]
    width = problem.attention_pool.gpu.bytes_per_number
    rows = rows_per_token(model.moe, mode, ffn_ranks=c.ffn_ranks, ffn_nodes=geometry.ffn_nodes)
    per_rank = problem.attention.gpus_per_rank[c.cut]
    tokens = (c.attention_ranks * job.tokens_per_rank).astype(np.float64)
    moved = volumes(model, geometry, rows, tokens=tokens, attention_groups=c.attention_groups, width=width)
    ends = _ends(problem, candidates, geometry)
    times = transfer_times(
        moved,
        geometry,
        ends,
        attention_pool=problem.attention_pool,
        ffn_pool=problem.ffn_pool,
        network=problem.cluster.network,
        imbalance=job.imbalance,
    )
    hidden = tokens * model.hidden_size * width
    return Links(
        m2n=times.m2n,
        n2m=times.n2m,
        lane=times.lane,
        packing=problem.packing_seconds(rows.packed, job.tokens_per_rank / per_rank),
        attention_buffers=hidden * rows.packed / ends.attention_gpus,
        ffn_buffers=hidden * (rows.packed + rows.handed_on) * job.imbalance / ends.ffn_gpus,
        lane_buffers=(moved.lane_off + moved.lane_on) / ends.attention_gpus,
        attention_per_node=geometry.attention_per_node,
        ffn_per_node=geometry.ffn_per_node,
    )


def _ends(problem: Problem, candidates: Candidates, geometry: Geometry) -> Ends:
    """GPUs of two groups and what each one's share of its node's NICs moves."""
    c = candidates
    a_node, f_node = problem.node_rates()
    a_rate, f_rate = np.full(len(c), a_node), np.full(len(c), f_node)
    if LAYOUTS[int(c.layout[0])] is not NodeLayout.SEPARATE and np.isfinite(a_node):
        split = problem.nics
        if split[0].attention:
            a_rate = np.array([each.attention_rate for each in split])[c.nics]
            f_rate = np.array([each.ffn_rate for each in split])[c.nics]
        else:
            both = geometry.attention_per_node + geometry.ffn_per_node
            a_rate, f_rate = a_node * geometry.attention_per_node / both, f_node * geometry.ffn_per_node / both
    return Ends(
        attention_gpus=(c.attention_ranks * problem.attention.gpus_per_rank[c.cut]).astype(np.float64),
        ffn_gpus=(c.ffn_ranks * c.expert_tensor_parallel).astype(np.float64),
        attention_nic=a_rate / geometry.attention_per_node,
        ffn_nic=f_rate / geometry.ffn_per_node,
    )

