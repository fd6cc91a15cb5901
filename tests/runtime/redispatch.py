"""Schedules in which FFN stages are dispatched twice, made from any other."""

from __future__ import annotations

import dataclasses

from megatron_disagmoe.schedules.actions import Action, Group, Kind, Schedule, Side


def redispatching(schedule: Schedule, *, every: int = 1) -> Schedule:
    """``schedule`` (compute actions only) with a ``D`` before the backward of every ``every``-th attention stage."""
    actions: dict[Group, tuple[Action, ...]] = {}
    for group, mine in schedule.actions.items():
        new: list[Action] = []
        for action in mine:
            kind, layer, micro_batch = action[:3]
            repeats = group.side is Side.A and kind in (Kind.B, Kind.I) and layer < schedule.placement.num_layers
            if repeats and (layer + micro_batch) % every == 0:
                new.append(Action(Kind.D, layer, micro_batch))
            new.append(action)
        actions[group] = tuple(new)
    return dataclasses.replace(schedule, actions=actions)
