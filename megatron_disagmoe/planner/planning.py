"""From a model, a cluster and a batch to ranked plans: over the cluster's pools and over bytes per parameter.

Fewer bytes per parameter change the numbers that are trained, so the most exact level that costs little wins: the first
whose best plan takes at most ``WORTH`` times as long as the fewest bytes would.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from megatron_disagmoe.planner.allocation import Job
from megatron_disagmoe.planner.cluster_spec import Cluster
from megatron_disagmoe.planner.contest import rerank
from megatron_disagmoe.planner.model_spec import ModelSpec
from megatron_disagmoe.planner.problem import Problem
from megatron_disagmoe.planner.rerank import Ranked, in_order
from megatron_disagmoe.planner.search import Found, search
from megatron_disagmoe.planner.space import Space
from megatron_disagmoe.planner.states import StateBytes, state_level, state_levels

#: How much longer a step of a more exact level may take.
WORTH = 1.25

#: Sequences of 4096 tokens a GPU in a step, and the most in all, where no batch is asked for.
_SEQUENCES_PER_GPU, _MOST_SEQUENCES = 8, 16384

#: What is under way, the share that is done, how many candidates were scored.
Progress = Callable[[str, float, int], None]


def default_batch(cluster: Cluster, *, sequence_length: int, micro_batch_size: int = 1) -> int:
    """A power of two: 8 sequences of 4K tokens a GPU, at most 16,384 of them (67M tokens; DeepSeek-V3 used 63M)."""
    sequences = min(_SEQUENCES_PER_GPU * cluster.num_gpus, _MOST_SEQUENCES) * 4096 / sequence_length
    power = 1
    while power * 2 <= sequences:
        power *= 2
    return max(power, 1) * micro_batch_size


@dataclass(frozen=True)
class Request:
    """What to plan. ``keep``: how many candidates the event engine ranks again."""

    model: ModelSpec
    cluster: Cluster
    job: Job
    space: Space = field(default_factory=Space)
    keep: int = 8

    def problems(self, state: StateBytes) -> list[Problem]:
        """One for every pair of pools whose GPUs compute in the same number format as ``state`` is for."""
        pools = self.cluster.pools
        pairs = itertools.product(range(len(pools)), repeat=2)
        return [
            Problem(self.model, self.cluster, self.job, self.space, state, a, f)
            for a, f in pairs
            if pools[a].gpu.dtype == pools[f].gpu.dtype and pools[a].num_gpus + (a != f) * pools[f].num_gpus > 1
        ]

    def levels(self) -> tuple[StateBytes, ...]:
        """Allowed bytes per parameter, the most exact first.

        Raises:
            ValueError: a level is asked for that the cluster's number format does not have.
        """
        dtype = self.cluster.pools[0].gpu.dtype
        asked = self.space.bytes_per_parameter
        levels = state_levels(dtype) if asked is None else tuple(state_level(dtype, total) for total in asked)
        if not self.space.distributed_optimizer:
            needing = [level.total for level in levels if level.flags]
            levels = tuple(level for level in levels if not level.flags)
            if not levels:
                raise ValueError(f"--bytes-per-parameter {needing[0]} needs the distributed optimizer: allow it")
        return tuple(sorted(levels, key=lambda level: -level.total))


@dataclass(frozen=True)
class LevelSearch:
    """The candidates of one level, by pair of pools; equal depths apart where the best are all unequal."""

    state: StateBytes
    found: tuple[Found, ...]

    @property
    def seconds(self) -> float:
        """The best analytic step time; infinite where nothing fits."""
        return min((float(each.seconds[0]) for each in self.found if len(each.seconds)), default=float("inf"))


@dataclass(frozen=True)
class Outcome:
    """Plans, best first; empty where nothing fits. ``levels``: what was searched, by bytes per parameter."""

    request: Request
    ranked: tuple[Ranked, ...]
    levels: tuple[LevelSearch, ...]
    state: StateBytes | None
    solve_seconds: float
    rerank_seconds: float

    @property
    def analytic_seconds(self) -> float:
        """The best analytic step time of the level that was chosen."""
        return min(level.seconds for level in self.levels if level.state == self.state)

    @property
    def num_scored(self) -> int:
        """Candidates whose time was computed."""
        return sum(found.scored for level in self.levels for found in level.found)


def plan(request: Request, *, progress: Progress | None = None) -> Outcome:
    """Search, then rank the best again exactly.

    Raises:
        ValueError: the choices given contradict model, batch or cluster.
    """
    begin = time.perf_counter()
    levels = _searched(request, progress)
    chosen = _chosen(levels)
    solved = time.perf_counter()
    ranked: list[Ranked] = []
    for level in _from(levels, chosen):
        ranked = rerank(*level.found, progress=part(progress, "ranking by simulation"))
        if ranked:  # else schedules need more memory than the closed form says: the next level
            chosen = level
            break
    return Outcome(
        request=request,
        ranked=tuple(in_order(ranked)),
        levels=tuple(levels),
        state=chosen.state if ranked and chosen else None,
        solve_seconds=solved - begin,
        rerank_seconds=time.perf_counter() - solved,
    )


def best_level(request: Request) -> LevelSearch | None:
    """The level that ``plan`` would choose, with its candidates unranked; None where nothing fits."""
    return _chosen(_searched(request, None))


def best_analytic(request: Request) -> LevelSearch | None:
    """``best_level`` with its best candidate alone, for comparisons of many requests."""
    return best_level(replace(request, keep=1))


def _searched(request: Request, progress: Progress | None) -> list[LevelSearch]:
    """Levels from the most exact until one is as good as the last would be."""
    levels = request.levels()
    done: list[LevelSearch] = []
    if len(levels) > 1:
        target = _least_seconds(request, levels[-1])
        for state in levels[:-1] if math.isfinite(target) else ():  # else more bytes fit still less
            done.append(_search_level(request, state, progress))
            if done[-1].seconds <= WORTH * target:
                return done
    return [*done, _search_level(request, levels[-1], progress)]


def _least_seconds(request: Request, state: StateBytes) -> float:
    """The best analytic step time of a level, by as little search as tells it."""
    seconds = [search(problem, keep=1).seconds for problem in request.problems(state)]
    return min((float(each[0]) for each in seconds if len(each)), default=math.inf)


def _search_level(request: Request, state: StateBytes, progress: Progress | None) -> LevelSearch:
    label = f"searching at {state.total} bytes a parameter"
    report = part(progress, label)
    found: list[Found] = []
    for problem in request.problems(state):
        free = search(problem, keep=request.keep, progress=report)
        depths = free.candidates
        if len(depths) and (depths.attention_groups != depths.ffn_groups).all():
            # Schedules of unequal depths can take far longer than the analytic time: one of equal depths is ranked too.
            equal = replace(problem, space=replace(problem.space, asymmetric=False))
            found.append(search(equal, keep=request.keep, progress=report))
        found.append(free)
    return LevelSearch(state, tuple(found))


def part(progress: Progress | None, label: str) -> Callable[[float, int], None] | None:
    """``progress`` for one part of the work, as searches (share, scored) and rankings (done, of how many) tell it."""
    if progress is None:
        return None
    known = progress

    def report(share: float, count: int) -> None:
        known(label, share if isinstance(share, float) else share / max(count, 1), count)

    return report


def _chosen(levels: list[LevelSearch]) -> LevelSearch | None:
    best = min((level.seconds for level in levels), default=float("inf"))
    if best == float("inf"):
        return None
    return next(level for level in levels if level.seconds <= WORTH * best)


def _from(levels: list[LevelSearch], chosen: LevelSearch | None) -> list[LevelSearch]:
    return levels[levels.index(chosen) :] if chosen else []
