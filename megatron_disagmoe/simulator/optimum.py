"""The shortest step of a small instance under a cap, by looking at every order: what bounds and builders are held to.

Transfers take their time but never wait for a port. So the result is a lower bound for real ports, the best possible
one that knows nothing of them.

**Micro-batches are alike.** Call the k-th forward of a stage that of micro-batch k, and the k-th backward as well.
Where every micro-batch came to a stage after the stage before, so does the k-th of the one after the k-th of the other;
and how many activations are alive does not change. So it is enough to count: a *place* is a stage's forward or backward
in the order in which a micro-batch comes through, and a state says how many micro-batches have begun at each place.

**States.** Every schedule can be written down in the order of its starts. A state after some of them holds, beside the
counts, when each group is free and when the micro-batches on their way arrive, neither before the last start: later
starts do not see more of the past. A group does one thing at a time, so at a start its live activations are forwards
begun less backwards begun. Of two states with the same counts the one that is nowhere earlier is dropped.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from megatron_disagmoe.simulator.workload import Paths, Workload

#: Counts of all places; when each group is free; when those arrive that have not begun at their next place.
_State = tuple[tuple[int, ...], tuple[float, ...], tuple[tuple[float, ...], ...]]
_Times = tuple[tuple[float, ...], tuple[tuple[float, ...], ...]]


@dataclass(frozen=True)
class _Place:
    """A stage's forward or backward. ``leg``: from its end to the next place; ``after``: to the end of the step."""

    group: int
    is_forward: bool
    duration: float
    leg: float
    after: float


def least_makespan(workload: Workload, max_live: int, *, below: float, most_states: int = 2_000_000) -> float | None:
    """The shortest step that keeps within ``max_live``, ports aside; None where there is none shorter than ``below``.

    Raises:
        ValueError: for split backwards, repeated dispatches or lanes; where there are more than ``most_states``.
    """
    if any(workload.split) or any(workload.again) or workload.forward_only or workload.costs.lane > 0:
        raise ValueError("only whole backwards, no repeated dispatch, no lane that takes time")
    places, n = _places(Paths(workload)), workload.num_micro_batches
    groups = max(place.group for place in places) + 1
    start: _State = ((0,) * len(places), (0.0,) * groups, ((),) * len(places))
    layer: dict[tuple[int, ...], list[_Times]] = {start[0]: [start[1:]]}
    looked_at = 0
    for _ in range(n * len(places)):
        following: dict[tuple[int, ...], set[_Times]] = {}
        for counts, fronts in layer.items():
            for free, arrivals in fronts:
                looked_at += 1
                for state in _next(places, n, max_live, (counts, free, arrivals), below):
                    following.setdefault(state[0], set()).add(state[1:])
        if looked_at > most_states:
            raise ValueError(f"more than {most_states} states: this instance is too large to look at every order")
        layer = {counts: _undominated(times) for counts, times in following.items()}
        if not layer:
            return None
    return min(max(free) for fronts in layer.values() for free, _ in fronts)


def _places(paths: Paths) -> list[_Place]:
    """Forward of every stage, then backward from the last one down."""
    last, rows = paths.last, []
    for stage in range(last + 1):
        leg = paths.edge[stage] if stage < last and paths.groups[stage] != paths.groups[stage + 1] else 0.0
        rows.append((paths.groups[stage], True, paths.forward[stage], leg))
    for stage in range(last, -1, -1):
        leg = paths.edge[stage - 1] if stage > 0 and paths.groups[stage] != paths.groups[stage - 1] else 0.0
        rows.append((paths.groups[stage], False, paths.backward[stage], leg))
    places: list[_Place] = []
    after = 0.0
    for group, is_forward, duration, leg in reversed(rows):
        after = after + leg if places else 0.0
        places.append(_Place(group, is_forward, duration, leg, after))
        after += duration
    return places[::-1]


def _next(places: list[_Place], n: int, max_live: int, state: _State, below: float) -> list[_State]:
    """What can be started next, and can still end before ``below``."""
    counts, free, arrivals = state
    now = min(free)  # nothing starts before any group is free; those that are have the time of the last start
    live = [0] * len(free)
    for place, count in zip(places, counts, strict=True):
        live[place.group] += count if place.is_forward else -count
    found = []
    for number, place in enumerate(places):
        if counts[number] == (counts[number - 1] if number else n):
            continue
        if place.is_forward and live[place.group] == max_live:
            continue
        arrival = arrivals[number][0] if number else now
        start = max(free[place.group], arrival)
        end = start + place.duration
        if end + place.after >= below:
            continue
        made = _started(places, state, number, start, end)
        if _can_end(places, n, made, below):
            found.append(made)
    return found


def _started(places: list[_Place], state: _State, number: int, start: float, end: float) -> _State:
    counts, free, arrivals = state
    new_free = [max(time, start) for time in free]
    new_free[places[number].group] = end
    waiting = [tuple(max(time, start) for time in times) for times in arrivals]
    waiting[number] = waiting[number][1:]
    if number + 1 < len(places):
        waiting[number + 1] = (*waiting[number + 1], end + places[number].leg)
    counts = (*counts[:number], counts[number] + 1, *counts[number + 1 :])
    return counts, tuple(new_free), tuple(waiting)


def _can_end(places: list[_Place], n: int, state: _State, below: float) -> bool:
    """Whether no group has too much left to do, and nobody under way is too late."""
    counts, free, arrivals = state
    work, tail = [0.0] * len(free), [float("inf")] * len(free)
    for place, count in zip(places, counts, strict=True):
        if count < n:
            work[place.group] += (n - count) * place.duration
            tail[place.group] = min(tail[place.group], place.after)
    if any(begin + rest + after >= below for begin, rest, after in zip(free, work, tail, strict=True) if rest):
        return False
    return all(
        times[0] + place.duration + place.after < below for place, times in zip(places, arrivals, strict=True) if times
    )


def _undominated(states: set[_Times]) -> list[_Times]:
    """Those that no other one is nowhere later than."""
    if len(states) == 1:
        return list(states)
    each = list(states)
    rows = np.array([[*free, *(time for times in arrivals for time in times)] for free, arrivals in each])
    order = np.argsort(rows.sum(axis=1), kind="stable")
    kept: list[int] = []
    for index in order.tolist():
        if not kept or not (rows[kept] <= rows[index]).all(axis=1).any():
            kept.append(index)
    return [each[index] for index in kept]
