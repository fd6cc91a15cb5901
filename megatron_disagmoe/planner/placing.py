"""Ways to place the layers of what the search found, which knows layers in turn: fewer beside a long output layer."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from megatron_disagmoe.builders.placement import balanced_placement, to_text
from megatron_disagmoe.planner.allocation import IN_TURN
from megatron_disagmoe.planner.evaluate import evaluate
from megatron_disagmoe.planner.evaluation import Evaluation

#: Of the output layer's weight, how much is made up for by fewer layers beside it.
_SHARES = (1.0, 0.75, 0.5, 0.25)
#: What another placement must gain (relative) to be looked at.
_BETTER = 1e-3


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
