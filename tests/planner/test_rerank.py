"""After ranking by simulation: at most 1% from the best that the event engine finds among all allocations."""

from __future__ import annotations

import dataclasses
import math
import random

import pytest

from megatron_disagmoe.planner.allocation import Allocation, NodeLayout
from megatron_disagmoe.planner.cluster_import import load_cluster
from megatron_disagmoe.planner.contest import rerank
from megatron_disagmoe.planner.evaluate import evaluate
from megatron_disagmoe.planner.evaluation import Evaluation
from megatron_disagmoe.planner.problem import Problem
from megatron_disagmoe.planner.rerank import Ranked, in_order, rank, ranked_as_planned
from megatron_disagmoe.planner.search import search
from megatron_disagmoe.simulator.bounds import lower_bounds
from megatron_disagmoe.simulator.workload import Workload
from tests.planner.oracle import Oracle
from tests.planner.problems import allocation, problem
from tests.planner.test_search import INSTANCES, random_problem

#: How far from the engine's optimum a plan may be.
BAR = 1.01
#: Most schedules that are simulated to find it.
MOST = 40
#: More than there are to try on any of the 200 instances.
EVERY = 3000


def _engine_best(problem: Problem, *, below: float, most: int) -> tuple[float, int]:
    """The least simulated step time of allocations that could be faster than ``below``; how many were simulated.

    Every schedule takes at least its allocation's bound, so the others need no schedule. At most ``most`` are tried,
    those with the lowest bounds.
    """
    bounds: dict[Allocation, float] = {}
    oracle = Oracle(problem)
    for shape in oracle.shapes():
        for each in oracle.timed(shape):
            key = dataclasses.replace(each.allocation, group_size=1)
            bounds[key] = min(each.bound, bounds.get(key, math.inf))
    best, simulated = math.inf, 0
    for candidate, bound in sorted(bounds.items(), key=lambda item: item[1]):
        if bound >= min(below, best) or simulated >= most:
            break
        evaluation = evaluate(problem, candidate)
        if _no_faster_than(evaluation) >= min(below, best):
            continue
        simulated += 1
        ranked = rank(evaluation, candidate.schedule)
        if ranked is not None:
            best = min(best, ranked.step_seconds)
    return best, simulated


def _no_faster_than(evaluation: Evaluation) -> float:
    """The simulator's strongest bound that needs no schedule."""
    a = evaluation.allocation
    workload = Workload.uniform(
        evaluation.placement,
        evaluation.costs,
        num_micro_batches=evaluation.num_micro_batches,
        split_backward=a.schedule == "split-backward",
        redispatch=a.redispatch,
    )
    return lower_bounds(workload).phase + evaluation.synchronise_seconds


def compare(numbers: range, *, most: int = MOST) -> tuple[list[float], int, int]:
    """Plan over engine's optimum of the feasible instances among ``numbers``; schedules simulated; where that ended.

    The last counts the instances with more allocations to try than ``most``.
    """
    rng = random.Random(20260510)
    ratios: list[float] = []
    simulated = cut = 0
    for number in range(numbers.stop):
        drawn = random_problem(rng)
        if number not in numbers:
            continue
        plans = rerank(search(drawn, keep=8))
        if not plans:
            continue
        best, count = _engine_best(drawn, below=plans[0].step_seconds / BAR, most=most)
        simulated, cut = simulated + count, cut + (count >= most)
        ratios.append(plans[0].step_seconds / min(best, plans[0].step_seconds))
    return ratios, simulated, cut


def test_the_plan_is_within_one_percent_of_the_engines_optimum() -> None:
    """On every tenth of the 200 instances; ``python -m tests.planner.test_rerank`` takes all of them."""
    ratios, simulated, cut = compare(range(5, INSTANCES, 10))
    print(f"{len(ratios)} problems, {simulated} schedules beside the planner's own, {cut} problems not exhausted")
    assert len(ratios) >= 10
    assert max(ratios) <= BAR


@pytest.mark.parametrize("seed", range(3))
def test_ranked_plans_are_in_order_and_fit(seed: int) -> None:
    drawn = random_problem(random.Random(seed))
    plans = rerank(search(drawn, keep=8))
    times = [each.step_seconds for each in plans]
    assert times == sorted(times)
    for each in plans:
        assert each.attention.total <= drawn.attention_pool.gpu.memory_gb * 1e9
        assert each.ffn.total <= drawn.ffn_pool.gpu.memory_gb * 1e9
        assert each.step_seconds >= each.evaluation.fill_bound


def test_ties_go_to_utilisation_and_then_to_fewer_gpus() -> None:
    """By hand: of three plans that take 10 s, 16 GPUs beat 24 of the same kind, and 24 of which 16 are half as fast."""
    cluster = load_cluster("h800-16x8")
    pool = cluster.pools[0]
    slow = pool.gpu.model_copy(update={"name": "half", "peak_tflops": pool.gpu.peak_tflops / 2})
    mixed = cluster.model_copy(update={"pools": (pool, pool.model_copy(update={"name": "half", "gpu": slow}))})
    known = problem("mixtral-8x7b", mixed, batch=64)

    def plan(ffn_groups: int, *, ffn_pool: int = 0, seconds: float = 10.0) -> Ranked:
        a = allocation(attention_groups=1, ffn_groups=ffn_groups, group_size=1, schedule="sequential")
        a = dataclasses.replace(a, nic_split=0, ffn_pool=ffn_pool, nodes=NodeLayout.SEPARATE)
        evaluation = evaluate(dataclasses.replace(known, ffn_pool_index=ffn_pool), a)
        ranked = ranked_as_planned(evaluation, group_size=None, max_live=None)
        return dataclasses.replace(ranked, pipeline_seconds=seconds - evaluation.synchronise_seconds)

    few, many, halves, fast = plan(1), plan(2), plan(2, ffn_pool=1), plan(2, seconds=9.99)
    utilisation = [each.evaluation.mfu_at(10.0) for each in (few, halves, many)]
    assert utilisation[0] == utilisation[1] == pytest.approx(1.5 * utilisation[2])
    assert in_order([many, halves, few]) == [few, halves, many]
    assert in_order([few, halves, fast]) == [fast, few, halves]  # a tie is no more than that


if __name__ == "__main__":
    found, tried, unfinished = compare(range(INSTANCES), most=EVERY)
    worse = sorted(ratio for ratio in found if ratio > BAR)
    print(f"{len(found)} problems, {tried} schedules, {unfinished} not exhausted; over {BAR}: {worse}")
