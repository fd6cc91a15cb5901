"""An allocation exactly: its schedule built and run by the event engine, its live activations counted.

Builders get the number of live activations that memory allows as a cap, and choose G themselves. Which candidates are
worth a schedule is decided in ``contest``.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from megatron_disagmoe import builders
from megatron_disagmoe.planner.allocation import IN_TURN, ScheduleKind
from megatron_disagmoe.planner.evaluate import evaluate
from megatron_disagmoe.planner.evaluation import Evaluation, GroupMemory
from megatron_disagmoe.planner.layered_costs import LayeredCosts
from megatron_disagmoe.planner.search import TIE
from megatron_disagmoe.schedules.actions import Group, Placement, Schedule, Side
from megatron_disagmoe.schedules.liveness import lifetimes, live_counts, peak_live
from megatron_disagmoe.schedules.orders import Orders
from megatron_disagmoe.simulator.simulate import simulate_orders
from megatron_disagmoe.simulator.step_bound import step_bound
from megatron_disagmoe.simulator.workload import Workload

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


def no_faster_than(evaluation: Evaluation, *, max_live: int | None = None) -> float:
    """The least step time of any schedule within the live activations that memory allows; infinite where none is.

    ``max_live``: a cap that is lower still.
    """
    synchronise = evaluation.synchronise_seconds
    if evaluation.allocation.schedule == "sequential":
        return evaluation.step_seconds
    cap = live_cap(evaluation) if max_live is None else max_live
    if cap < builders.least_live(evaluation.placement):
        return math.inf
    a = evaluation.allocation
    workload = Workload.uniform(
        evaluation.placement,
        evaluation.costs,
        num_micro_batches=evaluation.num_micro_batches,
        split_backward=a.schedule == "split-backward",
        redispatch=a.redispatch,
    )
    return step_bound(workload, max_live=cap) + synchronise


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


def rank(evaluation: Evaluation, kind: ScheduleKind, *, below: float = math.inf) -> Ranked | None:
    """The allocation with the best schedule of this kind that fits its memory; None where none does.

    Or where what fits takes ``below`` seconds a step at least, by its lower bound.
    """
    evaluation = evaluate(evaluation.problem, replace(evaluation.allocation, schedule=kind))
    cap = live_cap(evaluation)
    held = max(Counter(evaluation.placement.attention).values()), max(Counter(evaluation.placement.ffn).values())
    most, least = max(held) * evaluation.num_micro_batches, builders.least_live(evaluation.placement)
    for _ in range(_LOWER):
        if cap < least:
            return None
        # A cap that is never reached is none.
        ranked = ranked_as_planned(evaluation, group_size=None, max_live=None if cap >= most else cap)
        too_many = _too_many(ranked)
        if too_many <= 0:
            return ranked
        cap = min(cap, max(ranked.peak_live.values())) - too_many
        if cap >= least and no_faster_than(evaluation, max_live=cap) >= below:
            return None
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
        redispatch=redispatch,
    )
    return schedule, simulate_orders(Orders.of(schedule), costs).makespan


def live_cap(evaluation: Evaluation) -> int:
    """The most live activations, the tail's included, that every group can hold."""
    p = evaluation.problem
    a_usable, f_usable = p.attention_pool.gpu.usable_bytes, p.ffn_pool.gpu.usable_bytes
    a = evaluation.allocation
    tail_is_first = a.place_layers == IN_TURN and p.num_layers % a.attention_groups == 0
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
