"""What changes where attention layers do not go round the groups in turn: work and memory are other group by group."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from megatron_disagmoe.planner.allocation import Allocation
from megatron_disagmoe.planner.evaluation import Evaluation, GroupMemory
from megatron_disagmoe.planner.states import attention_parameters
from megatron_disagmoe.planner.synchronise import synchronise_seconds
from megatron_disagmoe.schedules.actions import Placement
from megatron_disagmoe.simulator.bounds import lower_bounds
from megatron_disagmoe.simulator.workload import Workload


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
