"""What is said of a plan: uses by hand, and a faster plan that turns up while explaining."""

from __future__ import annotations

import dataclasses

import pytest

from megatron_disagmoe.planner.activations import Recompute
from megatron_disagmoe.planner.allocation import Allocation, Job, NodeLayout
from megatron_disagmoe.planner.evaluate import evaluate
from megatron_disagmoe.planner.explain import explained, uses
from megatron_disagmoe.planner.model_import import load_model
from megatron_disagmoe.planner.planning import Outcome, Request
from megatron_disagmoe.planner.rerank import Ranked, ranked_as_planned
from megatron_disagmoe.planner.sensitivity import variations
from megatron_disagmoe.planner.space import Space
from tests.planner.problems import allocation, ideal_cluster, problem

#: One micro-batch after the other on machines at their peak: a step is a sum that can be worked by hand.
SPACE = Space(
    attention_groups=(1,),
    ffn_groups=(1,),
    attention_ranks=(8,),
    ffn_ranks=(8,),
    replicas=(1,),
    tensor_parallel=(1,),
    context_parallel=(1,),
    expert_tensor_parallel=(1,),
    recompute_attention=(Recompute.NONE, Recompute.FULL),
    ffn_levers=((Recompute.NONE, False),),
    dispatch=("per-expert",),
    layouts=(NodeLayout.SEPARATE,),
    schedules=("sequential",),
    distributed_optimizer=False,
    bytes_per_parameter=(18,),
)
BATCH = 64


def _sequential(**changes: object) -> Ranked:
    sizes: dict[str, object] = {"attention_groups": 1, "ffn_groups": 1, "dispatch": "per-expert"}
    a = allocation(**(sizes | {"schedule": "sequential", "group_size": 1, "nic_split": 0} | changes))
    e = evaluate(problem("mixtral-8x7b", ideal_cluster(memory_gb=2000), batch=BATCH, space=SPACE), a)
    return ranked_as_planned(e, group_size=None, max_live=None)


def test_a_faster_plan_without_a_lever_becomes_the_plan() -> None:
    slow = _sequential(recompute_attention=Recompute.FULL)
    request = Request(load_model("mixtral-8x7b"), ideal_cluster(memory_gb=2000), Job(4096, BATCH), SPACE, keep=1)
    found, said = explained(Outcome(request, (slow,), (), slow.evaluation.problem.state, 0.0, 0.0))
    best = found.ranked[0]
    assert best.evaluation.allocation.recompute_attention is Recompute.NONE
    # What is no longer run again, of each of 32 layers and 64 / 8 micro-batches: query, key, value and output
    # projections, scores and their use (2 FLOPs, (4096 + 1) / 2 positions, 32 heads, 128 + 128 numbers), the router.
    flops = 2 * 4096 * (32 + 8 + 8 + 32) * 128 + 2 * 2048.5 * 32 * 256 + 2 * 4096 * 8
    saved = 8 * 32 * 4096 * flops / 989.4e12
    assert slow.step_seconds - best.step_seconds == pytest.approx(saved, rel=1e-6)
    assert [each.step_seconds for each in found.ranked] == [best.step_seconds, slow.step_seconds]
    assert not any("recomputation" in line for line in said)  # it is off now
    assert found.state == slow.evaluation.problem.state


def test_a_lever_that_pays_stays_and_is_told() -> None:
    """Where the plan is the fast one, the search without its lever finds nothing better."""
    fast = _sequential()
    only = dataclasses.replace(SPACE, recompute_attention=(Recompute.NONE,))
    request = Request(load_model("mixtral-8x7b"), ideal_cluster(memory_gb=2000), Job(4096, BATCH), only, keep=1)
    found, said = explained(Outcome(request, (fast,), (), fast.evaluation.problem.state, 0.0, 0.0))
    assert found.ranked == (fast,)
    assert said == []


def test_uses_of_the_busiest_groups_by_hand() -> None:
    """Four layers of the quickstart on two attention and two FFN groups, in turn and otherwise."""

    def used(place_layers: str) -> dict[tuple[str, str], float]:
        a = Allocation(
            attention_groups=2, ffn_groups=2, attention_ranks=1, ffn_ranks=1, group_size=4, place_layers=place_layers
        )
        e = evaluate(problem("quickstart", "laptop", sequence=128, batch=16, bytes_per_parameter=16), a)
        ranked = ranked_as_planned(e, group_size=None, max_live=None)
        return {(use.side, use.resource): use.seconds / 16 for use in uses(ranked)}

    e = evaluate(
        problem("quickstart", "laptop", sequence=128, batch=16, bytes_per_parameter=16),
        Allocation(attention_groups=2, ffn_groups=2, attention_ranks=1, ffn_ranks=1, group_size=4),
    )
    m2n, n2m, lane = (float(each[0]) for each in (e.links.m2n, e.links.n2m, e.links.lane))
    both = [f + b for f, b in zip(e.costs.forward_times, e.costs.backward_times, strict=True)]
    first, stage, tail, ffn = both[0], both[2], both[8], both[1]
    in_turn = used("in-turn")  # stages 0, 2 and the tail on group 0; 1 and 3 on group 1
    assert in_turn["attention", "compute"] == pytest.approx(max(first + stage + tail, 2 * stage))
    # Group 0 sends 2 M2N, N2M gradients of stage 2 and of the tail, lanes: 0 to 1, 2 to 1 and 3, the tail to 3.
    # Group 1 sends as many M2N and gradients, and its lanes to 0 and 2, to 2 and the tail.
    assert in_turn["attention", "sending"] == pytest.approx(2 * m2n + 2 * n2m + 4 * lane)
    assert in_turn["ffn", "compute"] == pytest.approx(2 * ffn)
    assert in_turn["ffn", "sending"] == pytest.approx(2 * (m2n + n2m))
    placed = used("0,1,1,1,0/0,1,0,1")  # one layer and the tail on group 0, three on group 1
    assert placed["attention", "compute"] == pytest.approx(max(first + tail, 3 * stage))
    # Group 1: 3 M2N, 3 gradients; lanes to stage 0 and to the tail only, the others stay.
    assert placed["attention", "sending"] == pytest.approx(3 * m2n + 3 * n2m + 2 * lane)


def test_sensitivity_turns_each_constraint_round() -> None:
    cluster = ideal_cluster(memory_gb=2000)
    request = Request(load_model("mixtral-8x7b"), cluster, Job(4096, BATCH), SPACE, keep=1)
    changes = dict(variations(request))
    assert changes["whole nodes only"].space.whole_nodes
    assert not changes["equal depths only"].space.asymmetric
    assert changes["with a distributed optimizer"].space.distributed_optimizer
    free = changes["every other choice free"].space
    assert free.ffn_ranks is None
    assert free.bytes_per_parameter == (18,)
    assert not free.distributed_optimizer
    plain = dict(variations(dataclasses.replace(request, space=Space(whole_nodes=True))))
    assert not plain["nodes may be half used"].space.whole_nodes
    assert "no distributed optimizer" in plain
    assert "every other choice free" not in plain
