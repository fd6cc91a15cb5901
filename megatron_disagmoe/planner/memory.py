"""Bytes on the fullest GPU of either side.

Fixed: parameters with gradients and optimizer state (``states``), one stage's activations once more for what is rebuilt
and for gradients under way, logits, and transport buffers: two messages leaving and two arriving beside those that are
kept as a stage's input, and four lanes. The rest is live micro-batch-layers times what one keeps.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from megatron_disagmoe.planner.activations import PAIR_BYTES
from megatron_disagmoe.planner.arrays import Floats, Ints
from megatron_disagmoe.planner.links import Links
from megatron_disagmoe.planner.live import Live, live_counts
from megatron_disagmoe.planner.problem import Problem
from megatron_disagmoe.planner.space import FFN_LEVERS, Candidates
from megatron_disagmoe.planner.synchronise import parameters_of, shard

#: Messages that a rank has under way besides those it keeps.
MESSAGES, LANES = 4, 4


@dataclass(frozen=True)
class Fixed:
    """Bytes on a GPU that do not depend on the schedule, by what they are."""

    parameters: Floats
    optimizer: Floats
    workspace: Floats
    transport: Floats

    @property
    def total(self) -> Floats:
        return self.parameters + self.optimizer + self.workspace + self.transport


@dataclass(frozen=True)
class SideMemory:
    """One group's GPU: ``fixed``, and bytes a live micro-batch-layer keeps."""

    fixed: Fixed
    kept: Floats


@dataclass(frozen=True)
class Memory:
    """The groups that may be fullest: attention group 0, the tail's group, FFN group 0."""

    first: SideMemory
    tail: SideMemory
    ffn: SideMemory


def memory_of(problem: Problem, candidates: Candidates, links: Links) -> Memory:
    """Bytes of each candidate's groups."""
    c, a, f = candidates, problem.attention, problem.ffn
    p = parameters_of(problem, candidates)
    depth, cut, r = c.attention_groups - 1, c.cut, c.recompute
    copies = shard(p.attention_copies, distributed=problem.space.distributed_optimizer)
    transport = MESSAGES * links.attention_buffers + LANES * links.lane_buffers
    at_tail = a.tail_kept[cut, r] + a.tail_workspace[cut]

    def attention(parameters: Floats, extra: Floats, kept: Floats) -> SideMemory:
        fixed = _states(problem, parameters, copies, a.workspace[cut, r] + extra, transport)
        return SideMemory(fixed, kept)

    tail_is_first = problem.num_layers % c.attention_groups == 0
    m = np.searchsorted(f.attention_ranks, c.attention_ranks)
    n = np.searchsorted(f.ffn_ranks, c.ffn_ranks)
    e = np.searchsorted(f.cuts, c.expert_tensor_parallel)
    workspace = f.workspace[c.ffn_lever, m, n, e]
    again = np.array([redispatch for _, redispatch in FFN_LEVERS])[c.ffn_lever]
    pairs = problem.job.tokens_per_rank * problem.model.moe.top_k * PAIR_BYTES * c.attention_ranks / c.ffn_ranks
    kept = np.where(again, pairs, f.kept[c.ffn_lever, m, n, e])
    ffn_transport = MESSAGES * links.ffn_buffers
    ffn_copies = shard(p.ffn_copies, distributed=problem.space.distributed_optimizer)
    return Memory(
        first=attention(
            a.parameters_first[cut, depth], np.where(tail_is_first, at_tail, 0.0), a.kept_first[cut, r, depth]
        ),
        tail=attention(a.parameters_tail[cut, depth], at_tail, a.kept_tail[cut, r, depth]),
        ffn=SideMemory(_states(problem, p.ffn, ffn_copies, workspace, ffn_transport), kept),
    )


def _states(problem: Problem, parameters: Floats, copies: Floats, workspace: Floats, transport: Floats) -> Fixed:
    state = problem.state
    return Fixed(
        parameters=parameters * (state.weight + state.gradient),
        optimizer=parameters * state.optimizer / copies,
        workspace=workspace,
        transport=transport,
    )


def largest_group_size(problem: Problem, candidates: Candidates, memory: Memory) -> Ints:
    """The largest G whose live activations fit, at most n; below 1 where not even 1 does."""
    n = num_micro_batches(problem, candidates)
    a_usable, f_usable = problem.attention_pool.gpu.usable_bytes, problem.ffn_pool.gpu.usable_bytes
    live = live_counts(problem, candidates)
    sizes = [
        _group_size(live.first, memory.first, a_usable, n),
        _group_size(live.tail, memory.tail, a_usable, n),
        _group_size(live.ffn, memory.ffn, f_usable, n),
    ]
    return np.minimum(np.minimum.reduce(sizes), n)


def _group_size(live: Live, memory: SideMemory, usable: float, n: Ints) -> Ints:
    cap = np.floor((usable - memory.fixed.total) / memory.kept)
    largest = np.floor((cap - live.base) / np.maximum(live.per_group_size, 1))
    unlimited = (cap >= live.most * n) | ((live.per_group_size == 0) & (cap >= live.base))
    return np.where(unlimited, n, np.clip(largest, -1, n)).astype(np.int64)


def num_micro_batches(problem: Problem, candidates: Candidates) -> Ints:
    """n of each candidate."""
    batch = problem.job.global_batch_size // problem.job.micro_batch_size
    return batch // (candidates.attention_ranks * candidates.replicas)
