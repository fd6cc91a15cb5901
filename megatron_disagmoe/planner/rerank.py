"""The best candidates again, exactly: schedules built and run by the event engine, their live activations counted.

Builders get the number of live activations that memory allows as a cap, and choose G themselves. What cannot beat the
best so far, by its lower bound, is not built.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from megatron_disagmoe import builders
from megatron_disagmoe.builders.redispatch import redispatching
from megatron_disagmoe.planner.allocation import Allocation, ScheduleKind
from megatron_disagmoe.planner.evaluate import Evaluation, GroupMemory, allocation_of, evaluate
from megatron_disagmoe.planner.layered_costs import LayeredCosts
from megatron_disagmoe.planner.problem import Problem
from megatron_disagmoe.planner.search import TIE, Found, search
from megatron_disagmoe.planner.space import fixed_sizes
from megatron_disagmoe.schedules.actions import Group, Placement, Schedule, Side
from megatron_disagmoe.schedules.liveness import lifetimes, live_counts, peak_live
from megatron_disagmoe.schedules.orders import Orders
from megatron_disagmoe.simulator.simulate import simulate_orders

#: Shapes whose other choices are tried, and how many choices are looked at for each.
_REFINED, _CHOICES = 2, 200
#: Most of them that are scheduled, for each shape: many where a schedule is small (layers x micro-batches), else few.
_MANY, _FEW, _SMALL = 40, 4, 200
#: How often a lower cap is tried for schedules whose tail holds more than one micro-batch.
_LOWER = 3


@dataclass(frozen=True)
class Ranked:
    """An allocation with its schedule. Seconds; ``attention``, ``ffn``: memory of the fullest GPUs at its live counts.

    ``group_size``, ``max_live``: what the schedule's builder was given, None where it was free.
    """

    evaluation: Evaluation
    schedule: Schedule
    group_size: int | None
    max_live: int | None
    peak_live: dict[Group, int]
    pipeline_seconds: float
    attention: GroupMemory
    ffn: GroupMemory

    @property
    def step_seconds(self) -> float:
        """With reducing gradients and updating weights."""
        return self.pipeline_seconds + self.evaluation.synchronise_seconds

    @property
    def analytic_seconds(self) -> float:
        """What the search says of a step with the builder's G; of builders without, where no G has to be waited for."""
        e = self.evaluation
        size = self.built_with or e.num_micro_batches
        return evaluate(e.problem, replace(e.allocation, group_size=size)).step_seconds

    @property
    def built_with(self) -> int | None:
        """The G that the builder chose; None for kinds without."""
        size = self.schedule.parameters.get("group_size")
        return size if isinstance(size, int) else None


def rerank(
    found: Found, *, below: float = math.inf, progress: Callable[[int, int], None] | None = None
) -> list[Ranked]:
    """What of ``found`` fits with its real schedule, the fastest first; ties by utilisation, then by fewer GPUs.

    For the best shapes, and for those whose best choice fits with no real schedule, their other choices (layout,
    dispatch, levers, kinds of schedule) are tried too, by their lower bounds: with too little memory for an unhindered
    schedule the analytic time tells little. What cannot be faster than ``below`` is left out.
    """
    problem = found.problem
    contest = _Contest(below)
    without: list[Evaluation] = []
    for at in range(len(found.seconds)):
        evaluation = evaluate(problem, allocation_of(problem, found.candidates, at))
        chosen = evaluation.allocation.schedule
        kinds = [kind for kind in problem.space.schedules if kind != "sequential"]
        before = len(contest.ranked)
        for kind in kinds if chosen != "sequential" else [chosen]:
            contest.enter(evaluation, kind)
        if len(contest.ranked) == before:
            without.append(evaluation)
        if progress:
            progress(at + 1, len(found.seconds))
    for evaluation in [*without, *(each.evaluation for each in in_order(contest.ranked)[:_REFINED])]:
        _refine(problem, evaluation, contest)
    return in_order(contest.ranked)


class _Contest:
    """Ranks what may still win; the same only once."""

    def __init__(self, below: float) -> None:
        self.below = below
        self.ranked: list[Ranked] = []
        self._seen: set[Allocation] = set()

    @property
    def best(self) -> float:
        """The least step time so far."""
        return min((self.below, *(each.step_seconds for each in self.ranked)))

    def enter(self, evaluation: Evaluation, kind: ScheduleKind) -> bool:
        """Rank an allocation with this kind of schedule, unless its bound says that it cannot win."""
        allocation = replace(evaluation.allocation, schedule=kind, group_size=1)
        evaluation = evaluate(evaluation.problem, allocation)
        if allocation in self._seen or evaluation.fill_bound + evaluation.synchronise_seconds >= self.best:
            return False
        self._seen.add(allocation)
        ranked = rank(evaluation, kind)
        if ranked is not None:
            self.ranked.append(ranked)
        return True


def _refine(problem: Problem, shape: Evaluation, contest: _Contest) -> None:
    """Rank other choices for the sizes of ``shape``."""
    a = shape.allocation
    sizes = replace(problem, space=fixed_sizes(problem.space, a))
    found = search(sizes, keep=_CHOICES, every_choice=True)
    every = [evaluate(sizes, allocation_of(sizes, found.candidates, at)) for at in range(len(found.seconds))]
    left = _MANY if shape.num_micro_batches * problem.num_layers <= _SMALL else _FEW
    for evaluation in sorted(every, key=lambda each: each.fill_bound + each.synchronise_seconds):
        if left > 0 and contest.enter(evaluation, evaluation.allocation.schedule):
            left -= 1


def in_order(ranked: Sequence[Ranked]) -> list[Ranked]:
    """The fastest first, one for each shape; of ties the highest utilisation, then the fewest GPUs."""
    if not ranked:
        return []
    unit = min(each.step_seconds for each in ranked) * TIE

    def key(each: Ranked) -> tuple[int, float, int]:
        seconds = each.step_seconds
        return round(seconds / unit), -each.evaluation.mfu_at(seconds), each.evaluation.allocation.num_gpus

    result: list[Ranked] = []
    seen = set()
    for each in sorted(ranked, key=key):
        a = each.evaluation.allocation
        shape = replace(a, schedule="sequential", group_size=1)
        if shape not in seen:
            seen.add(shape)
            result.append(each)
    return result


def rank(evaluation: Evaluation, kind: ScheduleKind) -> Ranked | None:
    """The allocation with the best schedule of this kind that fits its memory; None where none does."""
    evaluation = evaluate(evaluation.problem, replace(evaluation.allocation, schedule=kind))
    cap = live_cap(evaluation)
    a = evaluation.allocation
    held = -(-evaluation.problem.num_layers // min(a.attention_groups, a.ffn_groups)) + 1
    most, least = held * evaluation.num_micro_batches, builders.least_live(evaluation.placement)
    for _ in range(_LOWER):
        if cap < least:
            return None
        # A cap that is never reached is none.
        ranked = ranked_as_planned(evaluation, group_size=None, max_live=None if cap >= most else cap)
        too_many = _too_many(ranked)
        if too_many <= 0:
            return ranked
        cap = min(cap, max(ranked.peak_live.values())) - too_many
    return None


def ranked_as_planned(evaluation: Evaluation, *, group_size: int | None, max_live: int | None) -> Ranked:
    """The allocation with the schedule that a plan names, whether it fits or not.

    Raises:
        ValueError: there is no such schedule.
    """
    a = evaluation.allocation
    schedule, seconds = _scheduled(
        a.schedule,
        evaluation.placement,
        evaluation.num_micro_batches,
        evaluation.costs,
        group_size=None if a.schedule == "sequential" else group_size,
        max_live=max_live,
        redispatch=a.redispatch,
    )
    live = peak_live(schedule)
    most_f = max(count for group, count in live.items() if group.side is Side.F)
    return Ranked(
        evaluation=evaluation,
        schedule=schedule,
        group_size=group_size,
        max_live=max_live,
        peak_live=live,
        pipeline_seconds=seconds,
        attention=_attention_memory(evaluation, schedule, live),
        ffn=evaluation.ffn.with_live(most_f),
    )


@lru_cache(maxsize=8)
def _scheduled(
    kind: ScheduleKind,
    placement: Placement,
    num_micro_batches: int,
    costs: LayeredCosts,
    *,
    group_size: int | None,
    max_live: int | None,
    redispatch: bool,
) -> tuple[Schedule, float]:
    """A schedule and its seconds. Ranking and verifying a plan ask for the same one."""
    schedule = builders.build(
        kind,
        placement,
        num_micro_batches=num_micro_batches,
        costs=costs,
        group_size=group_size,
        max_live=max_live,
    )
    if redispatch:
        schedule = redispatching(schedule, costs)
    return schedule, simulate_orders(Orders.of(schedule), costs).makespan


def live_cap(evaluation: Evaluation) -> int:
    """The most live activations, the tail's included, that every group can hold."""
    p = evaluation.problem
    a_usable, f_usable = p.attention_pool.gpu.usable_bytes, p.ffn_pool.gpu.usable_bytes
    tail_is_first = p.num_layers % evaluation.allocation.attention_groups == 0
    return min(
        evaluation.attention_first.most_live(a_usable) + tail_is_first,
        evaluation.attention_tail.most_live(a_usable) + 1,  # whose one tail is no micro-batch-layer
        evaluation.ffn.most_live(f_usable),
    )


def _attention_memory(evaluation: Evaluation, schedule: Schedule, live: dict[Group, int]) -> GroupMemory:
    """Of the fullest attention group. Weight gradients that are put off keep several micro-batches in the tail."""
    tail, layers = schedule.placement.tail_group, schedule.placement.num_layers
    others = max((count for group, count in live.items() if group.side is Side.A and group != tail), default=0)
    first, at_tail, one = evaluation.attention_first, evaluation.attention_tail, evaluation.tail_bytes
    length, lives = len(schedule.actions[tail]), lifetimes(schedule)[tail]
    over_time = zip(
        live_counts((life for life in lives if life.layer < layers), length),
        live_counts((life for life in lives if life.layer == layers), length),
        strict=True,
    )
    waiting = [at_tail.with_live(count, extra=max(tails - 1, 0) * one) for count, tails in set(over_time)]
    return max(*waiting, first.with_live(others), key=lambda memory: memory.total)


def _too_many(ranked: Ranked) -> int:
    """How many live activations fewer would fit; 0 where these do."""
    p = ranked.evaluation.problem
    sides = ((ranked.attention, p.attention_pool), (ranked.ffn, p.ffn_pool))
    return max(
        0, *(math.ceil((memory.total - pool.gpu.memory_gb * 1e9) / memory.kept_per_live) for memory, pool in sides)
    )
