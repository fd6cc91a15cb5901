"""The best candidates again, exactly: schedules built and run by the event engine, their live activations counted.

Builders get the number of live activations that memory allows as a cap, and choose G themselves. What cannot beat the
best so far, by its lower bound, is not built.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from megatron_disagmoe import builders
from megatron_disagmoe.builders.redispatch import redispatching
from megatron_disagmoe.planner.allocation import Allocation, ScheduleKind
from megatron_disagmoe.planner.evaluate import Evaluation, GroupMemory, allocation_of, evaluate
from megatron_disagmoe.planner.problem import Problem
from megatron_disagmoe.planner.search import TIE, Found, search
from megatron_disagmoe.planner.space import fixed_sizes
from megatron_disagmoe.schedules.actions import Group, Schedule, Side
from megatron_disagmoe.schedules.liveness import peak_live
from megatron_disagmoe.schedules.orders import Orders
from megatron_disagmoe.simulator.simulate import simulate_orders

#: Shapes whose other choices are tried, and how many choices are looked at for each.
_REFINED, _CHOICES = 2, 200
#: Most of them that are scheduled, for each shape: many where a schedule is small (layers x micro-batches), else few.
_MANY, _FEW, _SMALL = 40, 4, 200


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
    def built_with(self) -> int | None:
        """The G that the builder chose; None for kinds without."""
        size = self.schedule.parameters.get("group_size")
        return size if isinstance(size, int) else None


def rerank(
    found: Found, *, below: float = math.inf, progress: Callable[[int, int], None] | None = None
) -> list[Ranked]:
    """What of ``found`` fits with its real schedule, the fastest first; ties by utilisation, then by fewer GPUs.

    For the best shapes their other choices (layout, dispatch, levers, kinds of schedule) are tried too, by their lower
    bounds: with too little memory for an unhindered schedule the analytic time tells little. What cannot be faster
    than ``below`` is left out.
    """
    problem = found.problem
    contest = _Contest(below)
    for at in range(len(found.seconds)):
        evaluation = evaluate(problem, allocation_of(problem, found.candidates, at))
        chosen = evaluation.allocation.schedule
        kinds = [kind for kind in problem.space.schedules if kind != "sequential"]
        for kind in kinds if chosen != "sequential" else [chosen]:
            contest.enter(evaluation, kind)
        if progress:
            progress(at + 1, len(found.seconds))
    for best in in_order(contest.ranked)[:_REFINED]:
        _refine(problem, best, contest)
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


def _refine(problem: Problem, best: Ranked, contest: _Contest) -> None:
    a = best.evaluation.allocation
    sizes = replace(problem, space=fixed_sizes(problem.space, a))
    found = search(sizes, keep=_CHOICES, every_choice=True)
    every = [evaluate(sizes, allocation_of(sizes, found.candidates, at)) for at in range(len(found.seconds))]
    left = _MANY if best.evaluation.num_micro_batches * problem.num_layers <= _SMALL else _FEW
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
    cap: int | None = live_cap(evaluation)
    assert cap is not None, "it is a count"
    if cap < builders.least_live(evaluation.placement):
        return None
    a = evaluation.allocation
    most = -(-evaluation.problem.num_layers // min(a.attention_groups, a.ffn_groups)) + 1
    if cap >= most * evaluation.num_micro_batches:
        cap = None  # never reached
    ranked = ranked_as_planned(evaluation, group_size=None, max_live=cap)
    return ranked if _fits(ranked) else None


def ranked_as_planned(evaluation: Evaluation, *, group_size: int | None, max_live: int | None) -> Ranked:
    """The allocation with the schedule that a plan names, whether it fits or not.

    Raises:
        ValueError: there is no such schedule.
    """
    return _built(evaluation, group_size=group_size, max_live=max_live)


def live_cap(evaluation: Evaluation) -> int:
    """The most micro-batch-layers that every group can hold."""
    p = evaluation.problem
    a_usable, f_usable = p.attention_pool.gpu.usable_bytes, p.ffn_pool.gpu.usable_bytes
    sides = ((evaluation.attention_first, a_usable), (evaluation.attention_tail, a_usable), (evaluation.ffn, f_usable))
    return min(memory.most_live(usable) for memory, usable in sides)


def _built(evaluation: Evaluation, *, group_size: int | None, max_live: int | None) -> Ranked:
    kind = evaluation.allocation.schedule
    n = evaluation.num_micro_batches
    schedule = builders.build(
        kind,
        evaluation.placement,
        num_micro_batches=n,
        costs=evaluation.costs,
        group_size=None if kind == "sequential" else group_size,
        max_live=max_live,
    )
    if evaluation.allocation.redispatch:
        schedule = redispatching(schedule, evaluation.costs)
    live = peak_live(schedule)
    tail = schedule.placement.tail_group
    run = simulate_orders(Orders.of(schedule), evaluation.costs)
    most_a = max(count for group, count in live.items() if group.side is Side.A)
    most_f = max(count for group, count in live.items() if group.side is Side.F)
    sides = (evaluation.attention_first.with_live(most_a), evaluation.attention_tail.with_live(live[tail]))
    return Ranked(
        evaluation=evaluation,
        schedule=schedule,
        group_size=group_size,
        max_live=max_live,
        peak_live=live,
        pipeline_seconds=run.makespan,
        attention=max(sides, key=lambda memory: memory.total),
        ffn=evaluation.ffn.with_live(most_f),
    )


def _fits(ranked: Ranked) -> bool:
    p = ranked.evaluation.problem
    return (
        ranked.attention.total <= p.attention_pool.gpu.memory_gb * 1e9
        and ranked.ffn.total <= p.ffn_pool.gpu.memory_gb * 1e9
    )
