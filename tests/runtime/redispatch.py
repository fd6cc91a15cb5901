"""Schedules in which FFN stages are dispatched twice, made from any other."""

from __future__ import annotations

import dataclasses

from megatron_disagmoe.builders import NOMINAL_COSTS
from megatron_disagmoe.schedules.actions import Action, Group, Kind, Schedule, Side
from megatron_disagmoe.simulator.simulate import simulate


def redispatching(schedule: Schedule, *, every: int = 1) -> Schedule:
    """``schedule`` (compute actions only) with a ``D`` for every ``every``-th FFN stage.

    It stands where the attention group is when the tokens have to leave, in a simulated run: so everything can happen
    in order of these times, and nothing waits in a circle.
    """
    compute = simulate(schedule, NOMINAL_COSTS).compute
    backward = {
        span.action[1:3]: span.start
        for group, spans in compute.items()
        for span in spans
        if group.side is Side.F and span.action.kind in (Kind.B, Kind.I)
    }
    actions: dict[Group, tuple[Action, ...]] = {}
    for group, spans in compute.items():
        timed = [(span.start, number, span.action) for number, span in enumerate(spans)]
        for span in spans:
            kind, layer, micro_batch = span.action[:3]
            repeats = group.side is Side.A and kind is Kind.F and layer < schedule.placement.num_layers
            if repeats and (layer + micro_batch) % every == 0:
                leaves = max(span.end, backward[layer, micro_batch] - NOMINAL_COSTS.transfer)
                timed.append((leaves, -1, Action(Kind.D, layer, micro_batch)))
        actions[group] = tuple(action for *_, action in sorted(timed, key=lambda item: item[:2]))
    return dataclasses.replace(schedule, actions=actions)
