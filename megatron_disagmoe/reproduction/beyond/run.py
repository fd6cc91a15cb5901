"""Runs the points: Megatron-1F1B, the best of the paper's baselines, the fair rival and AF-pipe."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from typing import Any

from megatron_disagmoe.planner.layered_costs import LayeredCosts
from megatron_disagmoe.reproduction.beyond.points import LEVERS, Point
from megatron_disagmoe.reproduction.figures.base import gain, summary
from megatron_disagmoe.reproduction.systems.af_build import build
from megatron_disagmoe.reproduction.systems.af_paper import Evaluated, shapes
from megatron_disagmoe.reproduction.systems.af_pipe import best_af
from megatron_disagmoe.reproduction.systems.af_search import bound_seconds, promising, to_build
from megatron_disagmoe.reproduction.systems.af_search import run as run_shape
from megatron_disagmoe.reproduction.systems.catalogue import BASELINES
from megatron_disagmoe.reproduction.systems.choose import Task, best
from megatron_disagmoe.reproduction.systems.result import Result
from megatron_disagmoe.schedules.orders import Orders, group_of_stage
from megatron_disagmoe.simulator.simulate import simulate_orders

_BASELINES = ("megatron-1f1b", "comet", "dualpipe", "dualpipe-per-node")
RIVAL = "dualpipe-per-node"
#: Shapes that get schedules at a point.
_KEEP = 8


@dataclass(frozen=True)
class Outcome:
    """What a point came to; None where nothing fits."""

    point: Point
    results: dict[str, Result | None]
    least_bound: float

    @property
    def over_megatron(self) -> float:
        """AF-pipe's gain over Megatron-1F1B; 0 where either fits nowhere."""
        return gain(self.results["megatron-1f1b"], self.results["af-pipe"])

    @property
    def over_rival(self) -> float:
        """AF-pipe's gain over DualPipe with one copy per node; 0 where either fits nowhere."""
        return gain(self.results[RIVAL], self.results["af-pipe"])

    @property
    def of_bound(self) -> float:
        """The best allocation's lower bound over AF-pipe's time for as many tokens; 0 where nothing fits."""
        ours = self.results["af-pipe"]
        batch = self.point.task().tokens
        return self.least_bound / (batch / ours.tokens_per_second) if ours else 0.0

    def as_json(self) -> dict[str, Any]:
        """For the file of numbers."""
        return {
            "point": dataclasses.asdict(self.point),
            "over_megatron": self.over_megatron,
            "over_rival": self.over_rival,
            "of_lower_bound": self.of_bound,
            "systems": {name: summary(result) for name, result in self.results.items()},
        }


def run_point(point: Point) -> Outcome:
    """Every system at its best."""
    task = point.task()
    results: dict[str, Result | None] = {}
    for name in _BASELINES:
        system = BASELINES[name](task.constants)
        system.slow = point.slow
        results[name] = best(system, task)
    ours, bound = _af_pipe(point, task)
    results["af-pipe"] = ours
    return Outcome(point, results, bound)


def _af_pipe(point: Point, task: Task) -> tuple[Result | None, float]:
    """AF-pipe with the point's levers, and the least lower bound among the allocations that were looked at."""
    levers = LEVERS[point.levers]
    if levers.planner is not None:
        planned = best_af(task, space=levers.planner, keep=3)
        return planned, planned.least_bound if planned else 0.0
    possible = [dataclasses.replace(each, dispatch=levers.dispatch, kind=levers.kind) for each in shapes(task)]
    found = to_build([each for _, each in promising(task, possible)], _KEEP)
    best: tuple[Result, Evaluated] | None = None
    bounds = []
    for candidate in found:
        share = task.batch / candidate.batch
        bounds.append(bound_seconds(candidate) * share)
        below = candidate.batch * task.sequence / best[0].tokens_per_second if best else math.inf
        result = run_shape(candidate, below=below)
        if result is not None and (best is None or result.tokens_per_second > best[0].tokens_per_second):
            best = result, candidate
    if best is None:
        return None, 0.0
    result, candidate = best
    if point.slow > 1:
        result = with_slow_gpu(result, candidate, point.slow)
    return result, min(bounds)


def with_slow_gpu(result: Result, candidate: Evaluated, slow: float) -> Result:
    """The same schedule where one GPU of one group is slower: its whole group waits for it. The worst group counts."""
    schedule = build(candidate)
    assert schedule is not None, "it was built before"
    orders, costs = Orders.of(schedule), candidate.costs
    groups = group_of_stage(orders.placement).tolist()
    longest = max(simulate_orders(orders, _slowed(costs, groups, group, slow)).makespan for group in set(groups))
    step = longest + candidate.synchronise_seconds
    return dataclasses.replace(result, step_seconds=step, pipeline_seconds=longest)


def _slowed(costs: LayeredCosts, groups: list[int], group: int, slow: float) -> LayeredCosts:
    def scaled(times: tuple[float, ...]) -> tuple[float, ...]:
        return tuple(t * (slow if g == group else 1.0) for t, g in zip(times, groups, strict=True))

    return dataclasses.replace(
        costs,
        forward_times=scaled(costs.forward_times),
        backward_times=scaled(costs.backward_times),
        weight_times=scaled(costs.weight_times),
    )


def run_all(
    points: Sequence[Point], *, processes: int, progress: Callable[[str], None] | None = None
) -> list[Outcome]:
    """All of ``points``, several at once."""
    if processes == 1:
        outcomes = []
        for number, point in enumerate(points):
            outcomes.append(run_point(point))
            if progress:
                progress(f"{number + 1} of {len(points)}: {point.study}, {point.x}")
        return outcomes
    with ProcessPoolExecutor(processes) as pool:
        futures = {pool.submit(run_point, point): point for point in points}
        for number, future in enumerate(as_completed(futures)):
            if progress:
                point = futures[future]
                progress(f"{number + 1} of {len(points)}: {point.study}, {point.x}")
        return [future.result() for future in futures]


def markdown(outcomes: Sequence[Outcome]) -> str:
    """A table of all points."""
    lines = [
        "| study | model | at | AF-pipe, s | over Megatron-1F1B | over the rival | of the bound |",
        "|---|---|---|---|---|---|---|",
    ]
    for each in outcomes:
        ours = each.results["af-pipe"]
        seconds = f"{ours.step_seconds:.3g}" if ours else "fits nowhere"

        def shown(value: float) -> str:
            return f"{value:.2f}x" if value else "-"

        bound = f"{each.of_bound:.3f}" if ours else "-"
        cells = (each.point.study, each.point.model, each.point.x, seconds)
        lines.append(f"| {' | '.join(cells)} | {shown(each.over_megatron)} | {shown(each.over_rival)} | {bound} |")
    return "\n".join(lines) + "\n"
