"""The search: every allocation of a problem, scored as arrays, pruned by lower bounds.

An allocation joins two *halves*: attention (replicas R, ranks M, cut, depth pA) and FFN (R, M, ranks N, ETP, depth pF),
which share R and M. A half alone already takes some time (its busiest group's compute, under the cheapest levers that
memory may allow) and some GPUs; a pair takes at least the longer of the two. Pairs are scored in order of that bound,
until it exceeds the time of the last plan that would be kept; nothing that could be kept is skipped.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from megatron_disagmoe.planner.allocation import DISPATCH_MODES, SCHEDULE_KINDS
from megatron_disagmoe.planner.arrays import Bools, Floats, Ints
from megatron_disagmoe.planner.halves import Halves, attention_halves, ffn_halves
from megatron_disagmoe.planner.links import Links, link
from megatron_disagmoe.planner.memory import largest_group_size, memory_of, num_micro_batches
from megatron_disagmoe.planner.objective import (
    SEQUENTIAL,
    Stages,
    best_group_size,
    enough_group_size,
    pipeline_seconds,
    sequential_fits,
    sequential_seconds,
    stages_of,
    trip_of,
)
from megatron_disagmoe.planner.problem import Problem
from megatron_disagmoe.planner.space import FFN_LEVERS, LAYOUTS, Candidates
from megatron_disagmoe.planner.synchronise import synchronise_seconds

#: Pairs of halves scored at once, and the first, smaller helping that finds a time to prune by.
CHUNK, FIRST = 5_000, 256
#: Times closer than this (relative) are ties.
TIE = 1e-9

Progress = Callable[[float, int], None]

_SHAPE = (
    "attention_groups",
    "ffn_groups",
    "attention_ranks",
    "ffn_ranks",
    "replicas",
    "cut",
    "expert_tensor_parallel",
)
_CHOICE = tuple(name for name in Candidates.names() if name != "group_size")


@dataclass(frozen=True)
class Found:
    """The best candidates, best first: step time, and how many were looked at.

    ``pairs``: pairs of halves that fit the GPUs; ``scored``: full candidates whose time was computed.
    """

    problem: Problem
    candidates: Candidates
    seconds: Floats
    pairs: int
    scored: int
    solve_seconds: float


def search(
    problem: Problem, *, keep: int = 8, every_choice: bool = False, progress: Progress | None = None
) -> Found:
    """The ``keep`` best allocations by the analytic step time, fewer where fewer fit.

    One for each shape (sizes and cuts), or with ``every_choice`` one for each choice beside G. Ties go to the higher
    model FLOPs utilisation, then to fewer GPUs.
    """
    begin = time.perf_counter()
    attention, ffn = attention_halves(problem), ffn_halves(problem)
    best = _Best(problem, keep, every_choice=every_choice)
    _score(problem, _most_promising(problem, attention, ffn), best)
    parts = list(_pairs_below(problem, attention, ffn, best.limit))
    pairs = sum(len(bound) for _, bound in parts)
    if pairs:
        candidates = Candidates.join([part for part, _ in parts])
        bound = np.concatenate([part for _, part in parts])
        order = np.argsort(bound, kind="stable")
        for start in range(0, pairs, CHUNK):
            chosen = order[start : start + CHUNK]
            chosen = chosen[bound[chosen] <= best.limit]
            _score(problem, candidates.take(chosen), best)
            if progress:
                progress((start + len(chosen)) / pairs, best.scored)
    found, seconds = best.result()
    return Found(problem, found, seconds, pairs, best.scored, time.perf_counter() - begin)


class _Best:
    """The best candidates so far, one for each shape or choice."""

    def __init__(self, problem: Problem, keep: int, *, every_choice: bool) -> None:
        self.problem, self.keep, self.scored = problem, keep, 0
        self.different = _CHOICE if every_choice else _SHAPE
        self.candidates: Candidates | None = None
        self.seconds: Floats = np.zeros(0)
        self.limit = np.inf

    def add(self, candidates: Candidates, seconds: Floats) -> None:
        """Take note of some more."""
        self.scored += len(seconds)
        good = seconds <= self.limit
        if not good.any():
            return
        candidates, seconds = candidates.take(good), seconds[good]
        if self.candidates is not None:
            candidates = Candidates.join([self.candidates, candidates])
            seconds = np.concatenate((self.seconds, seconds))
        order = self._order(candidates, seconds)
        keys = np.stack([getattr(candidates, name)[order] for name in self.different], axis=1)
        _, first = np.unique(keys, axis=0, return_index=True)
        order = order[np.sort(first)][: self.keep]
        self.candidates, self.seconds = candidates.take(order), seconds[order]
        if len(order) == self.keep:
            self.limit = float(self.seconds[-1]) * (1 + TIE)

    def _order(self, candidates: Candidates, seconds: Floats) -> Ints:
        """By time, then by the FLOPs of the GPUs used (fewer: higher utilisation), then by GPUs, then by levers."""
        c, problem = candidates, self.problem
        a_gpus = c.replicas * c.attention_groups * c.attention_ranks * problem.attention.gpus_per_rank[c.cut]
        f_gpus = c.replicas * c.ffn_groups * c.ffn_ranks * c.expert_tensor_parallel
        peak = a_gpus * problem.attention_pool.gpu.peak_flops + f_gpus * problem.ffn_pool.gpu.peak_flops
        digits = np.floor(np.log10(seconds.min())) - 9
        rounded = np.round(seconds / 10.0**digits)
        levers = c.cut + c.recompute + c.ffn_lever
        return np.lexsort((c.dispatch, c.kind, levers, a_gpus + f_gpus, peak, rounded))

    def result(self) -> tuple[Candidates, Floats]:
        """Best first."""
        if self.candidates is None:
            nothing = np.zeros(0, np.int64)
            return Candidates(*(nothing for _ in Candidates.names())), np.zeros(0)
        return self.candidates, self.seconds


def _most_promising(problem: Problem, attention: Halves, ffn: Halves) -> Candidates:
    """The pairs with the lowest bounds, each attention half with its best FFN half."""
    parts, bounds = [], []
    for a, f in _buckets(attention, ffn):
        by_gpus = np.argsort(f.gpus, kind="stable")
        f = f.take(by_gpus)
        best = np.minimum.accumulate(f.bound)
        best_at = np.maximum.accumulate(np.where(f.bound == best, np.arange(len(f.bound)), 0))
        room = np.searchsorted(f.gpus, problem.max_gpus - a.gpus, side="right") - 1
        a, partner = a.take(room >= 0), best_at[room[room >= 0]]
        pairs = _join(a, f.take(partner))
        allowed = _depths_fit(problem, pairs.attention_groups, pairs.ffn_groups)
        same = np.flatnonzero(allowed)
        parts.append(pairs.take(same))
        bounds.append(np.maximum(a.bound, f.bound[partner])[same])
    if not parts:
        return _nobody()
    candidates, bound = Candidates.join(parts), np.concatenate(bounds)
    return candidates.take(np.argsort(bound, kind="stable")[:FIRST])


def _nobody() -> Candidates:
    nothing = np.zeros(0, np.int64)
    return Candidates(*(nothing for _ in Candidates.names()))


def _buckets(attention: Halves, ffn: Halves) -> Iterator[tuple[Halves, Halves]]:
    """Halves that share replicas and attention ranks."""
    a_key, f_key = attention.key, ffn.key
    a_order, f_order = np.argsort(a_key, kind="stable"), np.argsort(f_key, kind="stable")
    a_sorted, f_sorted = a_key[a_order], f_key[f_order]
    for key in np.intersect1d(a_sorted, f_sorted):
        a = a_order[np.searchsorted(a_sorted, key) : np.searchsorted(a_sorted, key, side="right")]
        f = f_order[np.searchsorted(f_sorted, key) : np.searchsorted(f_sorted, key, side="right")]
        yield attention.take(a), ffn.take(f)


def _pairs_below(
    problem: Problem, attention: Halves, ffn: Halves, limit: float
) -> Iterator[tuple[Candidates, Floats]]:
    """Every pair that fits the GPUs, whose depths go together and whose bound is at most ``limit``."""
    attention, ffn = attention.take(attention.bound <= limit), ffn.take(ffn.bound <= limit)
    for a, f in _buckets(attention, ffn):
        fits = a.gpus[:, None] + f.gpus[None, :] <= problem.max_gpus
        fits &= _depths_fit(problem, a.groups[:, None], f.groups[None, :])
        at_a, at_f = np.nonzero(fits)
        if len(at_a):
            a, f = a.take(at_a), f.take(at_f)
            yield _join(a, f), np.maximum(a.bound, f.bound)


def _depths_fit(problem: Problem, attention_groups: Ints, ffn_groups: Ints) -> Bools:
    """Equal depths, or depths whose virtual groups all get a layer."""
    if not problem.space.asymmetric:
        return attention_groups == ffn_groups
    return np.lcm(attention_groups, ffn_groups) <= problem.num_layers


def _join(attention: Halves, ffn: Halves) -> Candidates:
    zero = np.zeros(len(attention.groups), np.int64)
    return Candidates(
        attention_groups=attention.groups,
        ffn_groups=ffn.groups,
        attention_ranks=attention.attention_ranks,
        ffn_ranks=ffn.ffn_ranks,
        replicas=attention.replicas,
        cut=attention.cut,
        expert_tensor_parallel=ffn.cut,
        layout=zero,
        dispatch=zero,
        nics=zero,
        recompute=zero,
        ffn_lever=zero,
        kind=zero,
        group_size=zero,
    )


def _score(problem: Problem, pairs: Candidates, best: _Best) -> None:
    """Every way to lay out, link, recompute and schedule the pairs."""
    space = problem.space
    for layout in (LAYOUTS.index(each) for each in space.layouts):
        for dispatch in (DISPATCH_MODES.index(each) for each in space.dispatch):
            if len(pairs):
                candidates, links = link(problem, pairs, layout=layout, dispatch=dispatch)
                _score_linked(problem, candidates, links, best)


def _score_linked(problem: Problem, candidates: Candidates, links: Links, best: _Best) -> None:
    space = problem.space
    for recompute in space.recompute_attention:
        for lever in space.ffn_levers:
            if not len(candidates):
                return
            c = candidates.with_(recompute=int(recompute), ffn_lever=FFN_LEVERS.index(lever))
            stages = stages_of(problem, c, links)
            good = _work_bound(problem, c, links, stages) <= best.limit
            if good.any():
                _score_levers(problem, c.take(good), links.take(good), best)


def _work_bound(problem: Problem, c: Candidates, links: Links, stages: Stages) -> Floats:
    """Busy time of compute and of the ports, which nothing can undercut."""
    tables, depth = problem.attention, c.attention_groups - 1
    n = num_micro_batches(problem, c)
    work = tables.group_work[c.cut, c.recompute, depth] + 2 * tables.depths.layers[depth] * links.packing[:, None]
    layers_f = -(-problem.num_layers // c.ffn_groups)
    ffn = layers_f * np.maximum(stages.ffn + stages.ffn_back, links.m2n + links.n2m)
    return np.asarray(n * np.maximum(work.max(axis=1), ffn), np.float64)


def _score_levers(problem: Problem, c: Candidates, links: Links, best: _Best) -> None:
    """Every kind of schedule, each with the largest useful G that fits."""
    memory = memory_of(problem, c, links)
    largest = largest_group_size(problem, c, memory)
    n = num_micro_batches(problem, c)
    for kind in (SCHEDULE_KINDS.index(each) for each in problem.space.schedules):
        c = c.with_(kind=kind)
        stages = stages_of(problem, c, links)
        if kind == SEQUENTIAL:
            fits = sequential_fits(problem, c, memory)
            fits &= sequential_seconds(problem, c, links, stages) <= best.limit
            chosen = c.with_(group_size=1)
        else:
            enough = enough_group_size(trip_of(c, links, stages))
            fits = largest >= 1
            chosen = c.with_(group_size=best_group_size(enough, np.maximum(largest, 1), n))
        if fits.any():
            chosen, chosen_links, stages = chosen.take(fits), links.take(fits), stages.take(fits)
            seconds = pipeline_seconds(problem, chosen, chosen_links, stages)
            best.add(chosen, seconds + synchronise_seconds(problem, chosen, chosen_links))
