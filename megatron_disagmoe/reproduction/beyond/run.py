"""Runs the points: Megatron-1F1B, the fair rival and AF-pipe."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from typing import Any, Self

from megatron_disagmoe.planner.layered_costs import LayeredCosts
from megatron_disagmoe.reproduction.beyond.points import LEVERS, Point
from megatron_disagmoe.reproduction.figures.base import gain, summary
from megatron_disagmoe.reproduction.systems.af_build import build
from megatron_disagmoe.reproduction.systems.af_paper import Evaluated
from megatron_disagmoe.reproduction.systems.af_pipe import best_af
from megatron_disagmoe.reproduction.systems.af_search import Best, fastest, promising
from megatron_disagmoe.reproduction.systems.af_shapes import shapes
from megatron_disagmoe.reproduction.systems.catalogue import BASELINES
from megatron_disagmoe.reproduction.systems.choose import Task, best
from megatron_disagmoe.reproduction.systems.result import Result
from megatron_disagmoe.schedules.orders import Orders, group_of_stage
from megatron_disagmoe.simulator.simulate import simulate_orders

RIVAL = "dualpipe-per-node"
_BASELINES = ("megatron-1f1b", RIVAL)
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


    def state(self) -> dict[str, Any]:
        """Everything, for a file that ``from_state`` reads."""
        names = [field.name for field in dataclasses.fields(Result)]
        results = {
            name: result and {field: getattr(result, field) for field in names}
            for name, result in self.results.items()
        }
        return {"point": dataclasses.asdict(self.point), "results": results, "least_bound": self.least_bound}

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> Self:
        """What ``state`` gave.

        Raises:
            TypeError: it has other fields: an older version wrote it.
        """
        results = {name: result and Result(**result) for name, result in state["results"].items()}
        return cls(Point(**state["point"]), results, state["least_bound"])


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
        planned = best_af(task, space=levers.planner)
        return planned, planned.least_bound if planned else 0.0
    best = _fastest(dataclasses.replace(point.case, slow=1.0))
    if best is None:
        return None, 0.0
    result = best.result if point.slow == 1 else with_slow_gpu(best.result, best.candidate, point.slow)
    return result, best.least_bound


@functools.lru_cache(maxsize=4)
def _fastest(point: Point) -> Best | None:
    """Of shapes with the point's levers, layers placed as the planner does.

    A slow GPU comes as a surprise, so it changes nothing here.
    """
    task, levers = point.task(), LEVERS[point.levers]
    possible = [dataclasses.replace(each, dispatch=levers.dispatch, kind=levers.kind) for each in shapes(task)]
    found = [each for _, each in promising(task, possible, place=True)]
    return fastest(task, found, keep=_KEEP, place=True)


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
    points: Sequence[Point],
    *,
    processes: int,
    progress: Callable[[str], None] | None = None,
    done: Callable[[Outcome], None] | None = None,
    before: Sequence[Outcome] = (),
) -> list[Outcome]:
    """All of ``points``, several at once, those that are the same case only once.

    Args:
        done: gets every case's outcome as it comes.
        before: cases that need not run again.
    """
    known = {outcome.point.case: outcome for outcome in before}
    cases = [case for case in dict.fromkeys(point.case for point in points) if case not in known]
    names = {point.case: f"{point.study}, {point.x}, {point.series}" for point in reversed(points)}

    def note(case: Point, outcome: Outcome) -> None:
        known[case] = outcome
        if done:
            done(outcome)
        if progress:
            progress(f"{len(known) - len(before)} of {len(cases)}: {names[case]}")

    if processes == 1:
        for case in cases:
            note(case, run_point(case))
    else:
        with ProcessPoolExecutor(processes) as pool:
            futures = {pool.submit(run_point, case): case for case in cases}
            for future in as_completed(futures):
                note(futures[future], future.result())
    return [dataclasses.replace(known[point.case], point=point) for point in points]


def markdown(outcomes: Sequence[Outcome]) -> str:
    """A table of all points."""
    lines = [
        "| study | series | at | AF-pipe, s | over Megatron-1F1B | over the rival | of the bound |",
        "|---|---|---|---|---|---|---|",
    ]
    for each in outcomes:
        ours = each.results["af-pipe"]
        seconds = f"{ours.step_seconds:.3g}" if ours else "fits nowhere"

        bound = f"{each.of_bound:.3f}" if ours else "-"
        cells = (each.point.study, each.point.series, each.point.x, seconds)
        gains = " | ".join(_gain(each, name) for name in _BASELINES)
        lines.append(f"| {' | '.join(cells)} | {gains} | {bound} |")
    return "\n".join(lines) + "\n"


def _gain(outcome: Outcome, name: str) -> str:
    if outcome.results[name] is None:
        return "it fits nowhere"
    return f"{gain(outcome.results[name], outcome.results['af-pipe']):.2f}x" if outcome.results["af-pipe"] else "-"
