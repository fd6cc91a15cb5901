"""Orders for a cap, small instances: many partial schedules at a time are extended action by action, the best are kept.

Micro-batches are alike, so a partial schedule is known by how many of them have begun at each *place* (a stage's
forward or backward, in the order in which a micro-batch comes through). All partial schedules have the same number of
actions, written down in the order of their starts; the ``width`` of them that can end earliest are extended.

How early one can end, for each group, is the larger of two bounds: when it is free plus the work it has left; and, as
at most K activations are alive, the present moment plus 1/K of the time that all its activations still have to live if
from now on no micro-batch waits (Little's law; what has waited has to live as long as before, only later). A group that
is late holds up all others in the end, and those that are early do not help; so the largest counts, and the mean too.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
from numba import njit
from numpy.typing import NDArray

from megatron_disagmoe.schedules.orders import B, F, Ints, Orders, sorted_orders
from megatron_disagmoe.simulator.engine import Floats, ticks_per_unit
from megatron_disagmoe.simulator.workload import Paths, Workload

#: Time between two departures at least, as a share of the pace that cap and work allow.
_APART = (0.6, 0.0, 0.9)
#: Partial schedules that are kept: at most, and times actions and places. Below the least the instance is too large.
_WIDEST, _EFFORT, _LEAST = 200, 3_000_000, 16
#: Of the mean over the groups, beside the largest.
_MEAN = 2.0
#: Partial schedules among which doubles are looked for.
_DOUBLES = 40


@dataclass(frozen=True)
class _Places:
    """Forward of every stage, then backward from the last one down; times in ticks.

    ``leg``: transfer to the next place, 0 within a group. ``alone``: start of a micro-batch that has the machine to
    itself. ``after``: from the last action of each group to the end. ``corners``, ``area``, ``height``: of what a lone
    micro-batch holds on each group: moments at which that changes, what is still to come from then on, and how many.
    ``last_forward``: each group's last forward place. ``scale``: ticks in a unit of time.
    """

    stage: Ints
    group: Ints
    is_forward: NDArray[np.bool_]
    duration: Ints
    leg: Ints
    alone: Ints
    after: Ints
    corners: Ints
    area: Floats
    height: Ints
    last_forward: Ints
    scale: float


def beamed(workload: Workload, max_live: int) -> Iterator[tuple[Orders, dict[str, object]]]:
    """Orders with whole backwards that keep within ``max_live``, and how each was made; none where too large.

    ``max_live`` must be at least the stages of the fullest group.
    """
    if any(workload.split):
        workload = replace(workload, split=(0,) * len(workload.split))
    n, places = workload.num_micro_batches, _places(Paths(workload))
    count = len(places.stage)
    width = min(_WIDEST, _EFFORT // (n * count * count))
    if width < _LEAST:
        return
    pace = max(
        float(np.bincount(places.group, places.duration).max()), float(places.area[:, 0].max()) / max_live
    )
    num_stages = np.bincount(places.group[places.is_forward])
    for share in _APART:
        sequence = _search(
            width,
            n,
            max_live,
            int(share * pace),
            places.group,
            places.is_forward,
            places.duration,
            places.leg,
            places.alone,
            places.after,
            places.corners,
            places.area,
            places.height,
            places.last_forward,
            num_stages,
        )
        if len(sequence):
            yield _orders(workload, places, sequence), {"width": width, "apart": share * pace / places.scale}


def _places(paths: Paths) -> _Places:
    last = paths.last
    stage = np.concatenate((np.arange(last + 1), np.arange(last + 1)[::-1]))
    group = np.unique(paths.groups, return_inverse=True)[1][stage]  # a group without stages has no number here
    is_forward = np.arange(len(stage)) <= last
    both = [i + w for i, w in zip(paths.inputs, paths.weights, strict=True)]
    time = np.where(is_forward, np.array(paths.forward)[stage], np.array(both)[stage])
    legs = np.concatenate((paths.edge, [0.0], paths.edge[::-1], [0.0]))
    legs = np.where(np.append(group[1:], group[-1]) == group, 0.0, legs)
    scale = ticks_per_unit(np.concatenate((time, legs)))
    duration, leg = (np.rint(times * scale).astype(np.int64) for times in (time, legs))
    alone = np.concatenate(([0], np.cumsum(duration + leg)[:-1]))
    end = alone + duration
    groups = int(group.max()) + 1
    after = np.array([end[-1] - end[group == g].max() for g in range(groups)])
    size = 2 * (last + 1) + 1
    corners, height = np.full((groups, size), end[-1]), np.zeros((groups, size), np.int64)
    for g in range(groups):
        moments = np.concatenate((alone[(group == g) & is_forward], end[(group == g) & ~is_forward]))
        change = np.repeat((1, -1), len(moments) // 2)
        order = np.lexsort((change, moments))
        corners[g, 0], corners[g, 1 : len(moments) + 1] = 0, moments[order]
        height[g, 1 : len(moments) + 1] = np.cumsum(change[order])
    spans = np.diff(corners, axis=1) * height[:, :-1]
    area = np.concatenate((np.cumsum(spans[:, ::-1], axis=1)[:, ::-1], np.zeros((groups, 1))), axis=1)
    last_forward = np.array([np.flatnonzero((group == g) & is_forward)[-1] for g in range(groups)])
    return _Places(
        stage, group, is_forward, duration, leg, alone, after, corners, area.astype(float), height, last_forward, scale
    )


def _orders(workload: Workload, places: _Places, sequence: Ints) -> Orders:
    micro_batch = np.empty(len(sequence), np.int64)
    for place in range(len(places.stage)):
        micro_batch[sequence == place] = np.arange(workload.num_micro_batches)
    return sorted_orders(
        workload.placement,
        num_micro_batches=workload.num_micro_batches,
        forward_only=False,
        kind=np.where(places.is_forward[sequence], F, B),
        stage=places.stage[sequence],
        micro_batch=micro_batch,
        keys=(np.arange(len(sequence)),),
    )


@njit(cache=True)
def _rest(moment: int, corners: Ints, area: Floats, height: Ints) -> float:
    """What a micro-batch that is where a lone one is at ``moment`` still has to hold on a group."""
    at = max(int(np.searchsorted(corners, moment, side="right")) - 1, 0)
    return float(area[at] - height[at] * (moment - corners[at]))


@njit(cache=True)
def _may_begin(
    place: int,
    counts: Ints,
    live: Ints,
    cap: int,
    group: Ints,
    is_forward: NDArray[np.bool_],
    last_forward: Ints,
    num_stages: Ints,
) -> bool:
    """Whether the group has a place for one more forward: the rule of ``listing``, so that the oldest gets through."""
    mine = group[place]
    if not is_forward[place]:
        return True
    if live[mine] >= cap:
        return False
    oldest = counts[last_forward[mine]]
    if counts[place] <= oldest:
        return True
    young = 0
    for other in range(last_forward[mine] + 1):
        if group[other] == mine:
            young += max(0, counts[other] - oldest - 1)
    return bool(young < cap - num_stages[mine])


@njit(cache=True)
def _still_held(
    held: Floats,
    counts: Ints,
    arrival: Ints,
    n: int,
    started: int,
    now: int,
    alone: Ints,
    corners: Ints,
    area: Floats,
    height: Ints,
) -> None:
    """What all micro-batches still have to hold on each group when one begins at place ``started``, now."""
    for group in range(len(held)):
        held[group] = _rest(alone[started], corners[group], area[group], height[group])
    for place in range(len(counts)):
        low, high = counts[place] + (place == started), n if place == 0 else counts[place - 1]
        if place == 0:
            for group in range(len(held)):
                held[group] += (high - low) * area[group, 0]
            continue
        for micro_batch in range(low, high):
            moment = alone[place] - max(0, arrival[place, micro_batch] - now)
            for group in range(len(held)):
                held[group] += _rest(moment, corners[group], area[group], height[group])


@njit(cache=True)
def _search(
    width: int,
    n: int,
    cap: int,
    apart: int,
    group: Ints,
    is_forward: NDArray[np.bool_],
    duration: Ints,
    leg: Ints,
    alone: Ints,
    after: Ints,
    corners: Ints,
    area: Floats,
    height: Ints,
    last_forward: Ints,
    num_stages: Ints,
) -> Ints:
    """The places of the best schedule in order of start; empty where all partial schedules came to a dead end."""
    count, groups = len(group), len(num_stages)
    total = n * count
    counts = np.zeros((2, width, count), np.int64)
    arrival = np.zeros((2, width, count, n), np.int64)
    free, sending = np.zeros((2, width, groups), np.int64), np.zeros((2, width, groups), np.int64)
    receiving, live = np.zeros((2, width, groups), np.int64), np.zeros((2, width, groups), np.int64)
    work = np.zeros((2, width, groups), np.int64)
    now, departs = np.zeros((2, width), np.int64), np.zeros((2, width), np.int64)
    for place in range(count):
        work[0, 0, group[place]] += n * duration[place]
    parent, chosen = np.zeros((total, width), np.int32), np.zeros((total, width), np.int32)
    value, start = np.empty(width * count), np.empty(width * count, np.int64)
    origin, begun = np.empty(width * count, np.int64), np.empty(width * count, np.int64)
    held = np.zeros(groups)
    size, this = 1, 0
    for step in range(total):
        found = 0
        for one in range(size):
            c = counts[this, one]
            for place in range(count):
                if c[place] == (n if place == 0 else c[place - 1]):
                    continue
                if not _may_begin(place, c, live[this, one], cap, group, is_forward, last_forward, num_stages):
                    continue
                ready = departs[this, one] if place == 0 else arrival[this, one, place, c[place]]
                begin = max(ready, free[this, one, group[place]], now[this, one])
                _still_held(held, c, arrival[this, one], n, place, begin, alone, corners, area, height)
                largest = total_time = 0.0
                for mine in range(groups):
                    done, left = max(free[this, one, mine], begin), work[this, one, mine]
                    if mine == group[place]:
                        done, left = begin + duration[place], left - duration[place]
                    ends = max(float(done + left + after[mine]), begin + held[mine] / cap)
                    largest = max(largest, ends)
                    total_time += ends
                value[found], start[found] = largest + _MEAN * total_time / groups, begin
                origin[found], begun[found] = one, place
                found += 1
        following, kept = 1 - this, 0
        for candidate in np.argsort(value[:found]):
            if kept == width:
                break
            one, place, begin = origin[candidate], begun[candidate], start[candidate]
            mine, end = group[place], begin + duration[place]
            counts[following, kept] = counts[this, one]
            number = counts[following, kept, place]
            counts[following, kept, place] += 1
            free[following, kept] = np.maximum(free[this, one], begin)
            free[following, kept, mine] = end
            now[following, kept] = begin
            if _is_double(following, kept, counts, free, now):
                continue
            arrival[following, kept] = arrival[this, one]
            sending[following, kept], receiving[following, kept] = sending[this, one], receiving[this, one]
            live[following, kept], work[following, kept] = live[this, one], work[this, one]
            live[following, kept, mine] += 1 if is_forward[place] else -1
            work[following, kept, mine] -= duration[place]
            departs[following, kept] = begin + apart if place == 0 else departs[this, one]
            if place + 1 < count:
                if leg[place] > 0:
                    to = group[place + 1]
                    end = max(end, sending[following, kept, mine], receiving[following, kept, to]) + leg[place]
                    sending[following, kept, mine] = receiving[following, kept, to] = end
                arrival[following, kept, place + 1, number] = end
            parent[step, kept], chosen[step, kept] = one, place
            kept += 1
        if kept == 0:
            return np.empty(0, np.int64)
        size, this = kept, following
    best = 0
    for one in range(size):
        if free[this, one].max() < free[this, best].max():
            best = one
    sequence = np.empty(total, np.int64)
    for step in range(total - 1, -1, -1):
        sequence[step] = chosen[step, best]
        best = parent[step, best]
    return sequence


@njit(cache=True)
def _is_double(layer: int, new: int, counts: Ints, free: Ints, now: Ints) -> bool:
    """Whether one of the partial schedules kept just before is as far, and its groups are free at the same moments."""
    for other in range(new - 1, max(-1, new - 1 - _DOUBLES), -1):
        if now[layer, other] != now[layer, new]:
            continue
        if (free[layer, other] == free[layer, new]).all() and (counts[layer, other] == counts[layer, new]).all():
            return True
    return False
