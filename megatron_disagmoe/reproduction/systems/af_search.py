"""The fastest shape of the paper's AF-pipe that fits: by estimate, then with real schedules on the event engine."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from megatron_disagmoe import builders
from megatron_disagmoe.reproduction.systems.af_build import build
from megatron_disagmoe.reproduction.systems.af_paper import Evaluated, Shape, Shared
from megatron_disagmoe.reproduction.systems.af_pipe import slowed_cluster, without_network
from megatron_disagmoe.reproduction.systems.af_shapes import levers, shapes
from megatron_disagmoe.reproduction.systems.choose import Task
from megatron_disagmoe.reproduction.systems.result import Result
from megatron_disagmoe.schedules.actions import Side
from megatron_disagmoe.schedules.liveness import peak_live
from megatron_disagmoe.schedules.orders import Orders
from megatron_disagmoe.simulator.bounds import Workload, lower_bounds
from megatron_disagmoe.simulator.simulate import durations, simulate_orders

#: Of the most promising so many get lower bounds; so many of every 8 that are built are those of the lowest bounds.
_BOUNDED, _BY_BOUND = 32, 5
#: Of the output layer's weight, how much fewer layers beside it may make up for.
_TAIL_SHARES = (1.0, 0.75, 0.5, 0.25)
#: So many of the fastest shapes, and only those this near to the fastest, get schedules for their other placements too.
_PLACED, _NEAR = 2, 1.05


def slowed(task: Task) -> Task:
    """With compute slowed by what communication takes of the SMs, if anything."""
    sms = task.constants.af_communication_sms
    return dataclasses.replace(task, cluster=slowed_cluster(task.cluster, sms)) if sms else task


def promising(task: Task, possible: Iterable[Shape], *, place: bool = False) -> list[tuple[float, Evaluated]]:
    """Shapes with levers that may fit, by estimated seconds of the task's batch; the best lever of each shape alone.

    ``place``: estimated for layers placed to make up for the output layer.
    """
    best: dict[Shape, tuple[float, Evaluated]] = {}
    task, shared = slowed(task), Shared()
    for shape in possible:
        for candidate in levers(shape):
            found = Evaluated(task, candidate, shared)
            if found.most_live < found.layers_of_group:
                continue
            seconds = (found.estimate(place=place) + found.synchronise_seconds) * task.batch / found.batch
            if shape not in best or seconds < best[shape][0]:
                best[shape] = (seconds, found)
    return sorted(best.values(), key=lambda each: each[0])


def chosen(task: Task, possible: Iterable[Shape]) -> list[tuple[float, Evaluated]]:
    """``promising``, but where cuts aren't free only with the smallest cut of a sequence that fits in some shape."""
    if task.constants.free_cuts:
        return promising(task, possible)
    every = list(possible)
    for size in sorted({each.gpus_per_rank for each in every}):
        found = promising(task, [each for each in every if each.gpus_per_rank == size])
        if found:
            return found
    return []


def placed(candidate: Evaluated) -> Iterator[Evaluated]:
    """A shape whose layers are placed otherwise than in turn, to make up for the output layer.

    The baselines' last chunk has fewer layers for the same reason.
    """
    made = {candidate.placement}
    for share in _TAIL_SHARES if candidate.shape.groups > 1 else ():
        shape = dataclasses.replace(candidate.shape, tail_share=share)
        each = Evaluated(candidate.task, shape, candidate.shared)
        if each.placement not in made:
            made.add(each.placement)
            yield each


def by_bound(candidates: Iterable[Evaluated]) -> list[tuple[float, Evaluated]]:
    """The lowest bound a sequence first, with it; without those that fit nowhere."""
    bounds = [(bound_seconds(each) / each.batch, number, each) for number, each in enumerate(candidates)]
    return [(bound, each) for bound, _, each in sorted(bounds, key=lambda one: one[:2]) if math.isfinite(bound)]


def to_build(bounded: list[tuple[float, Evaluated]], found: list[Evaluated], keep: int) -> list[Evaluated]:
    """``keep`` of ``found``, which begins with the lowest estimates: the lowest bounds, and the lowest estimates."""
    lowest = [each for _, each in bounded][: -(-keep * _BY_BOUND // 8)]
    return [*lowest, *(each for each in found[:keep] if each not in lowest)][:keep]


@dataclass(frozen=True)
class Best:
    """The fastest that was built. ``least_bound``: of all that were looked at, for the task's batch."""

    result: Result
    candidate: Evaluated
    least_bound: float


def fastest(task: Task, found: list[Evaluated], *, keep: int, place: bool = False) -> Best | None:
    """The fastest schedule of the ``keep`` most promising of ``found``; None where nothing fits.

    Args:
        place: build the fastest shapes with layers placed otherwise, too, and count every placement's bound. Without,
            layers go in turn, as the paper has them.
    """
    bounded = by_bound(found[:_BOUNDED])
    built: list[tuple[Result, Evaluated]] = []

    def try_(candidate: Evaluated) -> None:
        most = max((result.tokens_per_second for result, _ in built), default=0.0)
        result = run(candidate, below=candidate.batch * task.sequence / most if most else math.inf)
        if result is not None:
            built.append((result, candidate))

    for candidate in to_build(bounded, found, keep):
        try_(candidate)
    built.sort(key=lambda each: -each[0].tokens_per_second)
    if not built:
        return None
    if place:
        bounded += by_bound(way for candidate in found[:_BOUNDED] for way in placed(candidate))
        least = built[0][0].tokens_per_second / _NEAR
        for result, candidate in built[:_PLACED]:
            for way in placed(candidate) if result.tokens_per_second >= least else ():
                try_(way)
    result, candidate = max(built, key=lambda each: each[0].tokens_per_second)
    return Best(result, candidate, min(bound for bound, _ in bounded) * task.batch)


def best_paper(task: Task, *, possible: Iterable[Shape] | None = None, keep: int = 8) -> Result | None:
    """The fastest of the ``keep`` most promising shapes; None where nothing fits.

    Args:
        possible: shapes to choose from; all that ``shapes`` lists where None.
    """
    found = [each for _, each in chosen(task, shapes(task) if possible is None else possible)]
    best = fastest(task, found, keep=keep)
    return best.result if best else None


def least_paper(task: Task, *, possible: Iterable[Shape] | None = None) -> Result | None:
    """What ``best_paper`` could find at best: a step at the lowest bound of all shapes, with nothing exposed.

    No schedule of any shape, within its memory, gets more tokens a second. None where nothing fits.
    """
    found = by_bound(each for _, each in chosen(task, shapes(task) if possible is None else possible))
    if not found:
        return None
    best, shape = found[0][1], found[0][1].shape
    seconds = bound_seconds(best)
    return Result(
        system="af-pipe",
        step_seconds=seconds,
        pipeline_seconds=seconds - best.synchronise_seconds,
        exposed_seconds=0.0,
        bubble_seconds=0.0,
        peak_bytes=0.0,
        tokens=best.batch * task.sequence,
        num_gpus=task.cluster.num_gpus,
        choice={
            "attention": f"{shape.groups} x {shape.attention_ranks}",
            "ffn": f"{shape.groups} x {shape.ffn_ranks}",
            "gpus": shape.gpus,
            "max_live": best.most_live,
        },
    )


def bound_seconds(candidate: Evaluated) -> float:
    """No schedule of this allocation, within its memory, makes a shorter step; infinite where none fits."""
    shape = candidate.shape
    if candidate.most_live < builders.least_live(candidate.placement):
        return math.inf
    workload = Workload.uniform(
        candidate.placement,
        candidate.costs,
        num_micro_batches=candidate.micro_batches,
        redispatch=shape.ffn_lever[1],
        split_backward=shape.kind == "split-backward",
    )
    return lower_bounds(workload, max_live=candidate.most_live).cap + candidate.synchronise_seconds


def run(candidate: Evaluated, *, below: float = math.inf) -> Result | None:
    """A shape's step with its schedule; None where it doesn't fit, or cannot be below ``below``."""
    task, shape, costs = candidate.task, candidate.shape, candidate.costs
    if candidate.most_live < builders.least_live(candidate.placement):
        return None
    bound = bound_seconds(candidate)
    if bound >= below:
        return None
    schedule = build(candidate)
    if schedule is None:
        return None
    orders = Orders.of(schedule)
    seconds = simulate_orders(orders, costs).makespan
    free = simulate_orders(orders, without_network(costs)).makespan
    work = durations(orders, costs)
    ends = zip(orders.bounds[:-1], orders.bounds[1:], strict=True)
    busiest = max(float(work[start:end].sum()) for start, end in ends)
    live = peak_live(schedule)
    a_live = max(count for group, count in live.items() if group.side is Side.A)
    f_live = max(count for group, count in live.items() if group.side is Side.F)
    (a_fixed, a_kept), (f_fixed, f_kept) = candidate.fixed_and_kept()
    reserved = task.cluster.pools[0].gpu.reserved_memory_gb * 1e9
    return Result(
        system="af-pipe",
        step_seconds=seconds + candidate.synchronise_seconds,
        pipeline_seconds=seconds,
        exposed_seconds=seconds - free,
        bubble_seconds=max(0.0, free - busiest),
        peak_bytes=max(a_fixed + a_live * a_kept, f_fixed + f_live * f_kept) + reserved,
        tokens=candidate.batch * task.sequence,
        num_gpus=task.cluster.num_gpus,
        choice={
            "attention": f"{shape.groups} x {shape.attention_ranks}",
            "ffn": f"{shape.groups} x {shape.ffn_ranks}",
            "replicas": shape.replicas,
            "tensor_parallel": shape.tensor_parallel,
            "context_parallel": shape.context_parallel,
            "gpus": shape.gpus,
            "recompute": f"{shape.recompute_attention.label}/{shape.ffn_lever[0].label}",
            "redispatch": shape.ffn_lever[1],
            "dispatch": shape.dispatch,
            "schedule": shape.kind,
            "micro_batches": candidate.micro_batches,
            "layers": "in turn" if not shape.tail_share else f"{shape.tail_share:g} of the tail made up for",
            "max_live": candidate.most_live,
            "lower_bound": bound,
        },
    )


def per_gpu(result: Result, gpus: int) -> float:
    """GPU seconds a token on the GPUs that a shape uses, where those are what is compared."""
    return result.step_seconds * gpus / result.tokens

