"""The analytic step time: equal to the simulator's bounds, close to what the event engine makes of schedules."""

from __future__ import annotations

import dataclasses
import math
import random

import pytest

from megatron_disagmoe import builders
from megatron_disagmoe.planner.activations import Recompute
from megatron_disagmoe.planner.allocation import DISPATCH_MODES, Allocation, NodeLayout, ScheduleKind
from megatron_disagmoe.planner.evaluate import evaluate
from megatron_disagmoe.planner.problem import Problem
from megatron_disagmoe.planner.space import FFN_LEVERS
from megatron_disagmoe.simulator.bounds import Workload, lower_bounds
from megatron_disagmoe.simulator.simulate import simulate
from tests.planner.problems import allocation, problem


def _random_allocation(rng: random.Random, planned: Problem, schedule: ScheduleKind) -> Allocation:
    depths = [(a, f) for a in range(1, 13) for f in range(1, 13) if math.lcm(a, f) <= planned.num_layers]
    attention_groups, ffn_groups = rng.choice(depths)
    recompute, redispatch = rng.choice(FFN_LEVERS)
    return allocation(
        attention_groups=attention_groups,
        ffn_groups=ffn_groups,
        attention_ranks=rng.choice([1, 2, 4, 8]),
        ffn_ranks=rng.choice([1, 2, 4, 8]),
        replicas=rng.choice([1, 2]),
        nodes=rng.choice(list(NodeLayout)),
        schedule=schedule,
        recompute_attention=rng.choice(list(Recompute)),
        recompute_ffn=recompute,
        redispatch=redispatch,
        dispatch=rng.choice(DISPATCH_MODES[:2]),
    )


@pytest.mark.parametrize("model", ["qwen3-235b-a22b", "deepseek-v3", "gpt-oss-120b", "deepseek-moe-16b", "quickstart"])
def test_the_fill_bound_is_the_simulators(model: str) -> None:
    """Dense first layers, alternating windows, heavy tails, lanes, repeated dispatches, unequal depths."""
    rng = random.Random(model)
    planned = problem(model, batch=256)
    for _ in range(25):
        e = evaluate(planned, _random_allocation(rng, planned, "interleaved-1f1b"))
        bounds = lower_bounds(
            Workload.uniform(
                e.placement, e.costs, num_micro_batches=e.num_micro_batches, redispatch=e.allocation.redispatch
            )
        )
        assert e.fill_bound == pytest.approx(bounds.fill, rel=1e-9)


def test_the_fill_bound_of_a_split_backward_never_exceeds_the_simulators() -> None:
    rng = random.Random(1)
    planned = problem("deepseek-v3", batch=256)
    for _ in range(40):
        e = evaluate(planned, _random_allocation(rng, planned, "split-backward"))
        workload = Workload.uniform(
            e.placement,
            e.costs,
            num_micro_batches=e.num_micro_batches,
            split_backward=True,
            redispatch=e.allocation.redispatch,
        )
        assert 0.995 < e.fill_bound / lower_bounds(workload).fill < 1 + 1e-9


def test_costs_add_up_to_what_a_group_does() -> None:
    e = evaluate(problem("deepseek-v3"), allocation(recompute_attention=Recompute.FULL))
    layers = 58
    costs = e.costs
    assert len(costs.forward_times) == 2 * layers + 1
    for stage in range(2 * layers + 1):
        whole = costs.input_gradient(stage, num_layers=layers) + costs.weight_gradient(stage, num_layers=layers)
        assert whole == pytest.approx(costs.backward_times[stage])
        assert costs.forward(stage, num_layers=layers) == costs.forward_times[stage]
    # A(0) has three dense layers more and the embedding
    assert costs.forward_times[0] > 3 * costs.forward_times[2]
    attention = costs.backward_times[2] / costs.forward_times[2]
    assert 2.9 < attention < 3.3  # all of it is run again


def test_sequential_is_one_micro_batch_after_the_other() -> None:
    e = evaluate(problem(batch=64), allocation(schedule="sequential"))
    schedule = builders.build("sequential", e.placement, num_micro_batches=8, costs=e.costs)
    # One micro-batch's last gradients overlap with the next one's first stage, at most.
    assert simulate(schedule, e.costs).makespan == pytest.approx(e.pipeline_seconds, rel=0.02)


def test_a_step_also_reduces_gradients_and_updates_weights() -> None:
    alone = evaluate(problem(), allocation())
    twice = evaluate(problem(batch=2048), allocation(replicas=2))
    assert twice.pipeline_seconds == pytest.approx(alone.pipeline_seconds)
    expert = 16 * 3 * 4096 * 14336
    # reduce-scatter fp32 gradients and all-gather bf16 weights over R = 2; 8 GPUs of a node share 8 NICs
    reduced = expert * (4 + 2) * (1 / 2) / (50e9 * 0.86)
    updated = 2 * 18 * expert / 2 / (3350e9 * 0.8)
    assert twice.synchronise_seconds == pytest.approx(reduced + updated)
    assert alone.synchronise_seconds < twice.synchronise_seconds


def test_utilisation_counts_model_flops_only() -> None:
    plain = evaluate(problem(), allocation())
    again = evaluate(problem(), allocation(recompute_attention=Recompute.FULL, recompute_ffn=Recompute.FULL))
    assert 0.1 < again.mfu < plain.mfu < 0.6
    assert again.mfu * again.step_seconds == pytest.approx(plain.mfu * plain.step_seconds)


def test_impossible_sizes_are_named() -> None:
    for change, name in (
        ({"ffn_ranks": 3}, "ffn_ranks 3"),
        ({"attention_ranks": 7}, "attention_ranks 7"),
        ({"attention_groups": 33}, "attention_groups 33"),
        ({"tensor_parallel": 16}, "tensor_parallel"),
        ({"nodes": NodeLayout.PAIRED, "nic_split": 8}, "nic_split 8"),
    ):
        with pytest.raises(ValueError, match=name):
            evaluate(problem(), dataclasses.replace(allocation(), **change))
