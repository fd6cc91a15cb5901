"""Halves of allocations with lower bounds on their time; see ``search``."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Self

import numpy as np

from megatron_disagmoe.planner.arrays import Bools, Floats, Ints
from megatron_disagmoe.planner.problem import Problem, divisors
from megatron_disagmoe.planner.space import FFN_LEVERS
from megatron_disagmoe.planner.synchronise import shard


@dataclass(frozen=True)
class Halves:
    """One side of allocations. ``cut``: index of (TP, CP), or ETP. ``bound``: seconds that a step takes at least."""

    replicas: Ints
    attention_ranks: Ints
    ffn_ranks: Ints
    cut: Ints
    groups: Ints
    gpus: Ints
    bound: Floats

    def take(self, which: Ints | Bools) -> Self:
        """Some of them."""
        return type(self)(*(getattr(self, field.name)[which] for field in fields(self)))

    @property
    def key(self) -> Ints:
        """The same where replicas and attention ranks are."""
        return self.replicas * 100_000_000 + self.attention_ranks


def _replicated_ranks(problem: Problem) -> list[tuple[int, int]]:
    """Every (R, M) that the batch divides over and the GPUs allow."""
    batch = problem.job.global_batch_size // problem.job.micro_batch_size
    ranks = problem.ffn.attention_ranks.tolist()
    asked = problem.space.replicas
    return [
        (r, m)
        for r in divisors(batch)
        if (asked is None or r in asked) and 2 * r <= problem.max_gpus
        for m in ranks
        if batch % (r * m) == 0 and r * (m + 1) <= problem.max_gpus
    ]


def _groups(asked: tuple[int, ...] | None, most: int) -> Ints:
    return np.array([p for p in range(1, most + 1) if asked is None or p in asked], np.int64)


def attention_halves(problem: Problem) -> Halves:
    """Every attention half that may fit its memory."""
    tables, layers = problem.attention, problem.num_layers
    pairs = np.array(_replicated_ranks(problem), np.int64).reshape(-1, 2)
    groups = _groups(problem.space.attention_groups, problem.max_groups)
    pair, cut, depth = (each.ravel() for each in np.meshgrid(
        np.arange(len(pairs)), np.arange(len(tables.cuts)), groups, indexing="ij"
    ))
    replicas, ranks = pairs[pair].T
    gpus = replicas * ranks * depth * tables.gpus_per_rank[cut]
    some = gpus < problem.max_gpus
    replicas, ranks, cut, depth, gpus = (each[some] for each in (replicas, ranks, cut, depth, gpus))
    copies = (replicas * ranks * tables.context_parallel[cut]).astype(np.float64)
    copies = shard(copies, distributed=problem.space.distributed_optimizer)
    state, usable = problem.state, problem.attention_pool.gpu.usable_bytes
    per_parameter = state.weight + state.gradient + state.optimizer / copies
    tail_layers = (layers - 1 - layers % depth) // depth + 1
    work = np.full(len(gpus), np.inf)
    for recompute in problem.space.recompute_attention:
        r = int(recompute)
        first = tables.parameters_first[cut, depth - 1] * per_parameter + tables.workspace[cut, r]
        first += tables.kept_first[cut, r, depth - 1] * -(-layers // depth)
        tail = tables.parameters_tail[cut, depth - 1] * per_parameter + tables.workspace[cut, r]
        tail += tables.kept_tail[cut, r, depth - 1] * tail_layers + tables.tail_kept[cut, r]
        tail += tables.tail_workspace[cut]
        fits = np.maximum(first, tail) <= usable
        busiest = tables.group_work[cut, r, depth - 1].max(axis=1)
        work = np.where(fits, np.minimum(work, busiest), work)
    n = problem.job.global_batch_size // problem.job.micro_batch_size // (replicas * ranks)
    halves = Halves(replicas, ranks, np.zeros_like(ranks), cut, depth, gpus, n * work)
    return halves.take(np.isfinite(work))


def ffn_halves(problem: Problem) -> Halves:
    """Every FFN half that may fit its memory."""
    tables, layers = problem.ffn, problem.num_layers
    pairs = np.array(_replicated_ranks(problem), np.int64).reshape(-1, 2)
    groups = _groups(problem.space.ffn_groups, problem.max_groups)
    pair, at_n, at_cut, depth = (each.ravel() for each in np.meshgrid(
        np.arange(len(pairs)), np.arange(len(tables.ffn_ranks)), np.arange(len(tables.cuts)), groups, indexing="ij"
    ))
    gpus = pairs[pair, 0] * tables.ffn_ranks[at_n] * tables.cuts[at_cut] * depth
    some = gpus < problem.max_gpus
    pair, at_n, at_cut, depth, gpus = (each[some] for each in (pair, at_n, at_cut, depth, gpus))
    replicas, ranks = pairs[pair].T
    at_m = np.searchsorted(tables.attention_ranks, ranks)
    copies = shard(replicas.astype(np.float64), distributed=problem.space.distributed_optimizer)
    state, usable = problem.state, problem.ffn_pool.gpu.usable_bytes
    held = -(-layers // depth)
    experts = problem.model.moe.num_experts * problem.model.num_expert_parameters
    parameters = held * experts / (tables.ffn_ranks[at_n] * tables.cuts[at_cut])
    fixed = parameters * (state.weight + state.gradient + state.optimizer / copies)
    work = np.full(len(gpus), np.inf)
    for lever in problem.space.ffn_levers:
        key = (FFN_LEVERS.index(lever), at_m, at_n, at_cut)
        fits = fixed + tables.workspace[key] + tables.kept[key] * held <= usable
        work = np.where(fits, np.minimum(work, held * (tables.forward[key] + tables.backward[key])), work)
    n = problem.job.global_batch_size // problem.job.micro_batch_size // (replicas * ranks)
    halves = Halves(replicas, ranks, tables.ffn_ranks[at_n], tables.cuts[at_cut], depth, gpus, n * work)
    return halves.take(np.isfinite(work))
