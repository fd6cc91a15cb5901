"""The paper's third step: from the planned seed, at most K real trials within radius r; the best measured wins.

After every trial the cost model is fitted anew to all of them, and the neighbour it likes best is tried next. Pure:
whoever calls says how to measure.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from megatron_disagmoe.planner.allocation import Allocation
from megatron_disagmoe.planner.cluster_spec import Cluster
from megatron_disagmoe.planner.evaluate import allocation_of, evaluate
from megatron_disagmoe.planner.plan_file import PlanFile
from megatron_disagmoe.planner.plan_making import plan_of
from megatron_disagmoe.planner.planning import Request, best_level, plan
from megatron_disagmoe.planner.problem import divisors
from megatron_disagmoe.planner.rerank import Ranked, rank

#: Measures a plan: whatever a fit needs, of which ``step_seconds`` is a part.
Measure = Callable[[PlanFile], Any]
Fit = Callable[[Cluster, Sequence[Any]], Cluster]


@dataclass(frozen=True)
class Tried:
    """One trial: what was predicted for it before, and what it took."""

    plan: PlanFile
    predicted_seconds: float
    trial: Any

    @property
    def seconds(self) -> float:
        """Of a step, measured."""
        return float(self.trial.step_seconds)


@dataclass(frozen=True)
class Profiled:
    """``best``: the best measured. ``cluster``: fitted to all trials."""

    best: Tried
    tried: tuple[Tried, ...]
    cluster: Cluster


def profile(request: Request, measure: Measure, fit: Fit, *, trials: int, radius: int) -> Profiled:
    """Measure the seed and what looks best around it.

    Raises:
        ValueError: nothing fits.
    """
    seeds = plan(request).ranked
    if not seeds:
        raise ValueError(f"--profile: no plan for {request.model.name} on {request.cluster.name} fits")
    seed = seeds[0].evaluation.allocation
    near = replace(request, space=replace(request.space, **_around(seed, request, radius)))
    cluster = request.cluster
    tried: list[Tried] = []
    upcoming: Ranked | None = seeds[0]
    while upcoming is not None and len(tried) < trials:
        planned = plan_of(upcoming)
        tried.append(Tried(planned, upcoming.step_seconds, measure(planned)))
        cluster = fit(request.cluster, [each.trial for each in tried])
        upcoming = _next(replace(near, cluster=cluster), [each.plan for each in tried])
    best = min(tried, key=lambda each: each.seconds)
    return Profiled(best, tuple(tried), cluster)


def _next(request: Request, done: Sequence[PlanFile]) -> Ranked | None:
    """The analytically best plan not yet tried, with its schedule; None where there is none.

    Not from ``plan``'s ranking, which leaves out what cannot win by prediction: whether it can is what a trial tells.
    """
    level = best_level(replace(request, keep=len(done) + request.keep))
    tried = {_key(planned) for planned in done}
    for found in level.found if level else ():
        for at in range(len(found.seconds)):
            evaluation = evaluate(found.problem, allocation_of(found.problem, found.candidates, at))
            ranked = rank(evaluation, evaluation.allocation.schedule)
            if ranked is not None and _key(plan_of(ranked)) not in tried:
                return ranked
    return None


def _key(planned: PlanFile) -> tuple[object, ...]:
    return planned.sizes, planned.levers, planned.machines.layout, planned.schedule.kind


def _around(seed: Allocation, request: Request, radius: int) -> dict[str, Any]:
    """Sizes at most ``radius`` steps from the seed's; a step goes to the next possible size."""
    batch = request.job.global_batch_size // request.job.micro_batch_size
    depths = list(range(1, request.model.num_moe_layers + 1))
    return {
        "attention_groups": _within(depths, seed.attention_groups, radius),
        "ffn_groups": _within(depths, seed.ffn_groups, radius),
        "attention_ranks": _within(divisors(batch), seed.attention_ranks, radius),
        "ffn_ranks": _within(divisors(request.model.moe.num_experts), seed.ffn_ranks, radius),
        "replicas": _within(divisors(batch), seed.replicas, radius),
    }


def _within(possible: list[int], here: int, radius: int) -> tuple[int, ...]:
    at = possible.index(here)
    return tuple(possible[max(0, at - radius) : at + radius + 1])
