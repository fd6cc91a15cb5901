"""Attention layers beside a long output layer: fewer of them, in memory, time, plan file and explanation."""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import Any

import pytest

from megatron_disagmoe.planner.allocation import IN_TURN
from megatron_disagmoe.planner.cluster_import import load_cluster
from megatron_disagmoe.planner.cluster_spec import Cluster
from megatron_disagmoe.planner.evaluate import evaluate
from megatron_disagmoe.planner.evaluation import Evaluation
from megatron_disagmoe.planner.explain import explained
from megatron_disagmoe.planner.hosts import seats
from megatron_disagmoe.planner.model_import import load_model
from megatron_disagmoe.planner.placing import ways_to_place
from megatron_disagmoe.planner.plan_file import PlanFile
from megatron_disagmoe.planner.plan_making import plan_of
from megatron_disagmoe.planner.planning import Outcome, Request
from megatron_disagmoe.planner.rerank import ranked_as_planned
from megatron_disagmoe.planner.scaled import rehearsal
from megatron_disagmoe.planner.states import attention_parameters
from megatron_disagmoe.planner.verify import verify_plan
from megatron_disagmoe.schedules.actions import Side
from tests.planner.problems import allocation, problem

MODEL = "gpt-oss-120b"


SIZES = {"attention_groups": 4, "ffn_groups": 4, "attention_ranks": 4, "ffn_ranks": 16}


def _cluster(nic: float) -> Cluster:
    cluster = load_cluster("h800-16x8")
    pool = cluster.pools[0].model_copy(update={"nics_gbit_per_s": (nic,) * 8})
    return cluster.model_copy(update={"pools": (pool,)})


CLUSTER = _cluster(4000)


@pytest.fixture(scope="module")
def ways() -> tuple[Evaluation, Evaluation]:
    """Layers in turn and otherwise, where attention sets the pace and the output layer weighs nine stages."""
    in_turn, balanced = ways_to_place(evaluate(problem(MODEL, CLUSTER, batch=64), allocation(**SIZES)))
    return in_turn, balanced


def test_where_transfers_set_the_pace_layers_stay_in_turn() -> None:
    slow = evaluate(problem(MODEL, _cluster(50), batch=64), allocation(**SIZES))
    assert [each.allocation.place_layers for each in ways_to_place(slow)] == [IN_TURN]


def test_the_group_of_the_output_layer_holds_fewer_layers(ways: tuple[Evaluation, Evaluation]) -> None:
    in_turn, balanced = ways
    assert in_turn.allocation.place_layers == IN_TURN
    tail = balanced.placement.attention[-1]
    held = Counter(balanced.placement.attention[:-1])
    assert held[tail] < min(count for group, count in held.items() if group != tail)
    assert sum(held.values()) == in_turn.problem.num_layers
    assert balanced.fill_bound < in_turn.fill_bound


def test_parameters_go_with_their_layers(ways: tuple[Evaluation, Evaluation]) -> None:
    in_turn, balanced = ways
    parameters = attention_parameters(in_turn.problem.model)
    before = parameters.of_groups(4, tensor_parallel=1)
    after = parameters.of_placement(balanced.placement.attention, tensor_parallel=1)
    tied = in_turn.problem.model.tied_embeddings
    assert tied or after.sum() == pytest.approx(before.sum())
    per_parameter = in_turn.attention_tail.parameters_and_gradients / before[in_turn.placement.attention[-1]]
    tail = balanced.placement.attention[-1]
    assert balanced.attention_tail.parameters_and_gradients == pytest.approx(after[tail] * per_parameter)
    most = max(count for group, count in enumerate(after) if group != tail)
    assert balanced.attention_first.parameters_and_gradients == pytest.approx(most * per_parameter)


def test_a_placed_plan_reads_back_and_verifies(ways: tuple[Evaluation, Evaluation]) -> None:
    _, balanced = ways
    planned = plan_of(ranked_as_planned(balanced, group_size=None, max_live=None))
    planned = PlanFile.model_validate(planned.model_dump(mode="json"))
    text = balanced.allocation.place_layers
    assert planned.flags["--af-place-layers"] == text
    assert planned.allocation(pools=("h800",)).place_layers == text
    assert planned.placement(balanced.problem.num_layers) == balanced.placement
    model, cluster = load_model(MODEL), CLUSTER
    errors = [error for error in verify_plan(planned, model, cluster) if not error.startswith("memory_gb")]
    assert errors == []
    last = seats(balanced.allocation, cluster, num_layers=balanced.problem.num_layers)[-1]
    assert (last.group.side, last.group.index) == (Side.A, balanced.placement.attention[-1])
    wrong = planned.model_copy(update={"flags": planned.flags | {"--af-place-layers": "0,1,2,3,0"}})
    assert any("5 attention stages" in error for error in verify_plan(wrong, model, cluster))
    small = rehearsal(planned, model)
    assert Counter(small.plan.placement(small.model.num_moe_layers).attention)[1] != 2


def test_a_placed_plan_is_explained(ways: tuple[Evaluation, Evaluation]) -> None:
    """By what the best plan with layers in turn would take, which is longer here."""
    _, balanced = ways
    placed = ranked_as_planned(balanced, group_size=None, max_live=None)
    only: dict[str, Any] = {name: (value,) for name, value in balanced.allocation.sizes.items()}
    space = dataclasses.replace(balanced.problem.space, **only, distributed_optimizer=False)
    request = Request(balanced.problem.model, CLUSTER, balanced.problem.job, space, keep=1)
    found, said = explained(Outcome(request, (placed,), (), balanced.problem.state, 0.0, 0.0))
    assert found.ranked[0].step_seconds <= placed.step_seconds
    line = next(line for line in said if line.startswith("attention layers placed"))
    assert "without it" in line
    assert "as long" not in line
