"""An allocation whose attention layers do not go round the groups in turn: fewer lie beside a long output layer.

The search knows layers in turn; what it found is evaluated here for another placement, group by group.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from megatron_disagmoe.builders.placement import balanced_placement, to_text
from megatron_disagmoe.planner.allocation import IN_TURN, Allocation
from megatron_disagmoe.planner.evaluate import Evaluation, GroupMemory, evaluate
from megatron_disagmoe.planner.states import attention_parameters
from megatron_disagmoe.planner.synchronise import synchronise_seconds
from megatron_disagmoe.schedules.actions import Placement
from megatron_disagmoe.simulator.bounds import lower_bounds
from megatron_disagmoe.simulator.workload import Workload

#: Of the output layer's weight, how much is made up for by fewer layers beside it.
_SHARES = (1.0, 0.75, 0.5, 0.25)
#: What another placement must gain (relative) to be looked at.
_BETTER = 1e-3


def evaluate_placed(evaluation: Evaluation, allocation: Allocation) -> Evaluation:
    """``evaluation`` (layers in turn) for an ``allocation`` that places them otherwise."""
    placed = replace(evaluation, allocation=allocation)
    problem, n = evaluation.problem, evaluation.num_micro_batches
    workload = Workload.uniform(
        placed.placement,
        placed.costs,
        num_micro_batches=n,
        split_backward=allocation.schedule == "split-backward",
        redispatch=allocation.redispatch,
    )
    bound = lower_bounds(workload).fill
    cut = int(evaluation.candidate.cut[0])
    tp, _ = problem.attention.cuts[cut]
    parameters = attention_parameters(problem.model).of_placement(placed.placement.attention, tensor_parallel=tp)
    most = np.full(1, parameters.max())
    first, tail = _memory(evaluation, placed.placement, parameters)
    return replace(
        placed,
        fill_bound=bound,
        pipeline_seconds=max(bound, evaluation.pipeline_seconds + bound - evaluation.fill_bound),
        synchronise_seconds=float(
            synchronise_seconds(problem, evaluation.candidate, evaluation.links, attention=most)[0]
        ),
        attention_first=first,
        attention_tail=tail,
    )


def ways_to_place(evaluation: Evaluation) -> Iterator[Evaluation]:
    """The allocation with its layers in turn, and with fewer beside the output layer where that has a lower bound.

    How many fewer is tried: what the output layer weighs in work, and less, as layers bring transfers with them too.
    """
    a, problem = evaluation.allocation, evaluation.problem
    ways = problem.space.place_layers
    if IN_TURN in ways:
        yield evaluation
    if "balanced" not in ways:
        return
    costs, made = evaluation.costs, set()
    for share in _SHARES:
        lighter = replace(costs, tail=share * costs.tail)
        made.add(balanced_placement(problem.num_layers, a.attention_groups, a.ffn_groups, lighter))
    others = [
        evaluate(problem, replace(a, place_layers=to_text(placement)))
        for placement in sorted(made - {evaluation.placement}, key=lambda placement: placement.attention)
    ]
    best = min(others, key=lambda each: each.fill_bound, default=None)
    if best is not None and (best.fill_bound < evaluation.fill_bound * (1 - _BETTER) or IN_TURN not in ways):
        yield best
    elif IN_TURN not in ways:
        yield evaluation


def _memory(
    evaluation: Evaluation, placement: Placement, parameters: np.ndarray
) -> tuple[GroupMemory, GroupMemory]:
    """The fullest of the groups without the tail, taken together the worst of each; and the tail's group."""
    tables, candidate, groups = evaluation.problem.attention, evaluation.candidate, np.array(placement.attention)
    cut, recompute = int(candidate.cut[0]), int(candidate.recompute[0])
    kept = tables.kept[cut, recompute, :-1]
    counts = np.bincount(groups[:-1], minlength=len(parameters))
    means = np.bincount(groups[:-1], kept, minlength=len(parameters)) / np.maximum(counts, 1)
    tail = groups[-1]
    others = np.arange(len(parameters)) != tail
    known = evaluation.attention_tail
    before = float(tables.parameters_tail[cut, evaluation.allocation.attention_groups - 1])

    def memory(held: float, each: float, workspace: float) -> GroupMemory:
        return replace(
            known,
            parameters_and_gradients=known.parameters_and_gradients * held / before,
            optimizer=known.optimizer * held / before,
            workspace=workspace,
            kept_per_live=each,
            activations=known.live * each,
        )

    at_tail = memory(float(parameters[tail]), float(means[tail]), known.workspace)
    first = memory(float(parameters[others].max()), float(means[others].max()), float(tables.workspace[cut, recompute]))
    return first, at_tail
