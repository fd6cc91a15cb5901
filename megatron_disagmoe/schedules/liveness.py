"""Which activations are alive when, read off a schedule alone.

The activation of a stage and micro-batch lives on its group from the start of F to the end of its last backward
action (B, or W where the backward is split; F itself where there is none). A re-dispatched FFN stage lives twice: while
F runs, and from B or I on. Receives that are posted early are not counted here; the verifier bounds them apart.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import accumulate
from typing import NamedTuple

from megatron_disagmoe.schedules.actions import Group, Kind, Schedule, Side
from megatron_disagmoe.schedules.dataflow import redispatched


class Lifetime(NamedTuple):
    """Positions in a group's list of the first and the last action that need an activation."""

    layer: int
    micro_batch: int
    first: int
    last: int


def lifetimes(schedule: Schedule) -> dict[Group, tuple[Lifetime, ...]]:
    """When each activation of each group lives, in order of its first action.

    Once action ``last`` has run the activation is dead and its memory may be used again. Where a schedule misses the
    backward of a stage, the activation lives to the end of the list.
    """
    again = redispatched(schedule)
    return {
        group: _lifetimes(schedule, group, again if group.side is Side.F else frozenset()) for group in schedule.actions
    }


def _lifetimes(schedule: Schedule, group: Group, again: frozenset[tuple[int, int]]) -> tuple[Lifetime, ...]:
    actions = schedule.actions[group]
    first: dict[tuple[int, int], int] = {}
    last: dict[tuple[int, int], int] = {}
    forwards: list[Lifetime] = []
    for position, (kind, layer, micro_batch, _, _) in enumerate(actions):
        key = layer, micro_batch
        if kind is Kind.F:
            if schedule.forward_only or key in again:
                forwards.append(Lifetime(layer, micro_batch, position, position))
            else:
                first.setdefault(key, position)
        elif kind is Kind.B or kind is Kind.W:
            first.setdefault(key, position)
            last[key] = position
        elif kind is Kind.I:
            first.setdefault(key, position)
    end = len(actions) - 1
    kept = [Lifetime(*key, start, last.get(key, end)) for key, start in first.items()]
    return tuple(sorted(forwards + kept, key=lambda life: life.first))


def live_counts(lives: Iterable[Lifetime], length: int) -> list[int]:
    """How many of ``lives`` are alive during each of a list's ``length`` actions."""
    change = [0] * (length + 1)
    for life in lives:
        change[life.first] += 1
        change[life.last + 1] -= 1
    return list(accumulate(change[:length]))


def live_over_time(schedule: Schedule) -> dict[Group, list[int]]:
    """Live activations of each group during each action of its list."""
    return {group: live_counts(lives, len(schedule.actions[group])) for group, lives in lifetimes(schedule).items()}


def peak_live(schedule: Schedule) -> dict[Group, int]:
    """The most activations each group ever holds at once."""
    return {group: max(counts, default=0) for group, counts in live_over_time(schedule).items()}
