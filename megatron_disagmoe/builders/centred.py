"""Circular timetables laid from the middle of a micro-batch's way outwards.

Where a micro-batch turns from forward to backward, all its activations are alive, and every moment that it waits there
costs as many of them as a group has stages. At both ends of its way it holds hardly any. What is placed last waits
most, since few gaps are left. So the middle is placed first: forwards as late, backwards as early as they can be.

Then single steps are made to keep a distance from their neighbour that they would not need, at random (always the same
sequence): a step that steps aside may leave a gap to several others.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numba import njit
from numpy.typing import NDArray

from megatron_disagmoe.builders.timetable import NEVER, Steps, fit, most_alive, take
from megatron_disagmoe.schedules.orders import Ints

#: How much worse a change may be that is kept, at first, and the weight of the mean over groups beside the fullest.
_WARM, _MEAN = 0.003, 0.2
_SEED = 1


@dataclass(frozen=True)
class Outward:
    """The steps in the order in which they are placed, and what follows on each.

    ``is_left``: whether a step comes before the turn, so that it is placed as late as can be. ``next_step``,
    ``other_next``: the steps that wait for it, -1 for none; of those before the turn only.
    """

    step: Ints
    is_left: NDArray[np.bool_]
    next_step: Ints
    other_next: Ints
    turn: int

    @classmethod
    def of(cls, steps: Steps) -> Outward:
        """Both sides in turn, at the same share of their way."""
        count, turn = len(steps.duration), int(steps.compute[len(steps.group)])
        middle, end = int(steps.alone[turn]), int(steps.alone[-1] + steps.duration[-1])
        share = np.abs(steps.alone + steps.duration - middle) / max(1, middle)
        share[turn:] = (steps.alone[turn:] - middle) / max(1, end - middle)
        share[:turn] = np.maximum.accumulate(share[:turn][::-1])[::-1]
        share[turn:] = np.maximum.accumulate(share[turn:])
        number = np.concatenate((np.arange(turn), np.arange(count - turn)))
        step = np.concatenate((np.arange(turn)[::-1], np.arange(turn, count)))
        is_left = step < turn
        order = np.lexsort((number, ~is_left, share[step]))
        first, second = np.full(count, -1, np.int64), np.full(count, -1, np.int64)
        for later in range(turn):
            for earlier in (int(steps.after[later]), int(steps.also[later])):
                if earlier >= 0:
                    place = first if first[earlier] < 0 else second
                    place[earlier] = later
        return cls(step[order], is_left[order], first, second, turn)


def centred(steps: Steps, outward: Outward, period: int, max_live: int, tries: int) -> Ints | None:
    """Starts of the steps of a micro-batch that leaves once in ``period``, within the cap; None where none is found."""
    times, found = _search(
        _SEED,
        tries,
        period,
        max_live,
        steps.num_groups,
        steps.busiest + 2,
        steps.duration,
        steps.first,
        steps.second,
        steps.after,
        steps.also,
        outward.next_step,
        outward.other_next,
        outward.step,
        outward.is_left,
        outward.turn,
        steps.compute,
        steps.keeps,
    )
    return times - times.min() if found else None


@njit(cache=True)
def fit_late(begin: Ints, end: Ints, count: int, period: int, deadline: int, time: int) -> int:
    """Last moment from which a resource is free for ``time`` until ``deadline``; -NEVER where it never is."""
    if time > period:
        return -NEVER
    if count == 0 or time == 0:
        return deadline - time
    at = deadline % period
    lap = deadline - at
    last = int(np.searchsorted(begin[:count], at)) - 1  # the last interval that begins before ``at``
    done = deadline
    while deadline - done <= period:
        if last < 0:
            last = count - 1
            lap -= period
        if done - (end[last] + lap) >= time:
            return done - time
        done = min(done, begin[last] + lap)
        last -= 1
    return -NEVER


@njit(cache=True)
def _on_both(
    begin: Ints, end: Ints, count: Ints, period: int, moment: int, time: int, one: int, other: int, is_left: bool
) -> int:
    """First moment from ``moment`` on at which both resources are free, or last one before it; NEVER for none."""
    t = moment
    for turn in range(64):
        resource = one if turn % 2 == 0 else other
        if resource < 0:
            return t
        if is_left:
            free = fit_late(begin[resource], end[resource], count[resource], period, t + time * (turn > 0), time)
            if free == -NEVER:
                return NEVER
        else:
            free = fit(begin[resource], end[resource], count[resource], period, t, time)
            if free < 0:
                return NEVER
        if turn > 0 and free == t:
            return t
        t = free
        if abs(t - moment) > 2 * period:
            break
    return NEVER


@njit(cache=True)
def _lay(
    begin: Ints,
    end: Ints,
    count: Ints,
    period: int,
    duration: Ints,
    first: Ints,
    second: Ints,
    after: Ints,
    also: Ints,
    next_step: Ints,
    other_next: Ints,
    order: Ints,
    is_left: NDArray[np.bool_],
    turn: int,
    distance: Ints,
    times: Ints,
) -> bool:
    """Place all steps; False where one finds no place."""
    count[:] = 0
    origin = 8 * period
    for row in range(len(order)):
        step = order[row]
        moment = origin
        if is_left[row]:
            for later in (next_step[step], other_next[step]):
                if later >= 0:
                    moment = min(moment, times[later])
            moment -= distance[step]
        else:
            if step != turn:
                moment = times[after[step]] + duration[after[step]]
                if also[step] >= 0:
                    moment = max(moment, times[also[step]] + duration[also[step]])
            moment += distance[step]
        t = _on_both(begin, end, count, period, moment, duration[step], first[step], second[step], is_left[row])
        if t == NEVER:
            return False
        times[step] = t
        take(begin, end, count, period, first, second, step, t, duration[step])
    return True


@njit(cache=True)
def _lives(times: Ints, keeps: Ints, duration: Ints, compute: Ints, lives: Ints) -> float:
    """Activations times time on the fullest group, and a little of the mean."""
    stages = len(keeps)
    lives[:] = 0
    for stage in range(stages):
        if keeps[stage] >= 0:
            last = compute[2 * stages - 1 - stage]
            lives[keeps[stage]] += times[last] + duration[last] - times[compute[stage]]
    return float(lives.max() + _MEAN * lives.mean())


@njit(cache=True)
def _search(
    seed: int,
    tries: int,
    period: int,
    max_live: int,
    num_groups: int,
    size: int,
    duration: Ints,
    first: Ints,
    second: Ints,
    after: Ints,
    also: Ints,
    next_step: Ints,
    other_next: Ints,
    order: Ints,
    is_left: NDArray[np.bool_],
    turn: int,
    compute: Ints,
    keeps: Ints,
) -> tuple[Ints, bool]:
    """The first timetable within the cap, among those with ever fewer activations; whether there is one."""
    np.random.seed(seed)
    begin, end = np.empty((3 * num_groups, size), np.int64), np.empty((3 * num_groups, size), np.int64)
    count, lives = np.zeros(3 * num_groups, np.int64), np.zeros(num_groups, np.int64)
    distance, times = np.zeros(len(duration), np.int64), np.zeros(len(duration), np.int64)
    longest = 3 * duration.max()
    cost = least = np.inf
    for trial in range(tries):
        step, other = compute[np.random.randint(len(compute))], compute[np.random.randint(len(compute))]
        was, other_was = distance[step], distance[other]
        if trial > 0:
            way = np.random.random()
            distance[step] = 0 if way < 0.4 else np.random.randint(longest)
            if way > 0.7:
                distance[other] = 0
        value = np.inf
        if _lay(
            begin, end, count, period, duration, first, second, after, also, next_step, other_next, order, is_left,
            turn, distance, times,
        ):  # fmt: skip
            value = _lives(times, keeps, duration, compute, lives)
        if (
            value < least
            and lives.max() <= max_live * period
            and most_alive(times.reshape(1, -1), period, num_groups, keeps, duration, compute) <= max_live
        ):
            return times, True
        least = min(least, value)
        if value <= cost + least * _WARM * np.random.random() * (1 - trial / tries) or trial == 0:
            cost = value
        else:
            distance[step], distance[other] = was, other_was
    return times, False
