"""Micro-batches laid into the gaps that others leave on groups and ports, within the cap on live activations."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numba import njit

from megatron_disagmoe.builders.timetable import NEVER, Steps, give_back, place
from megatron_disagmoe.schedules.orders import Ints


@dataclass(frozen=True)
class Taken:
    """When resources are taken and activations alive: rows of starts and ends in order, each so long as its count says.

    Rows of ``begin`` and ``end`` are resources (``Steps``), those of ``born`` and ``dead`` groups.
    """

    begin: Ints
    end: Ints
    count: Ints
    born: Ints
    dead: Ints
    lives: Ints

    @property
    def arrays(self) -> tuple[Ints, Ints, Ints, Ints, Ints, Ints]:
        """What ``fill_in`` wants, and changes."""
        return self.begin, self.end, self.count, self.born, self.dead, self.lives


def taken_by(plan: Ints, steps: Steps, *, room: int) -> Taken:
    """What the micro-batches of ``plan`` take, with room for ``room`` more starts and ends in each row."""
    uses = [(column, np.flatnonzero((column >= 0) & (steps.duration > 0))) for column in (steps.first, steps.second)]
    resource = np.concatenate([np.tile(column[step], len(plan)) for column, step in uses])
    starts = np.concatenate([plan[:, step].ravel() for _, step in uses])
    ends = starts + np.concatenate([np.tile(steps.duration[step], len(plan)) for _, step in uses])
    count = np.bincount(resource, minlength=3 * steps.num_groups)
    kept = np.flatnonzero(steps.keeps >= 0)
    groups = np.tile(steps.keeps[kept], len(plan))
    born = plan[:, steps.compute[kept]].ravel()
    last = steps.compute[2 * len(steps.group) - 1 - kept]
    dead = np.maximum((plan[:, last] + steps.duration[last]).ravel(), born + 1)
    lives = np.bincount(groups, minlength=steps.num_groups)
    return Taken(
        begin=_rows(resource, starts, count, room),
        end=_rows(resource, ends, count, room),
        count=count,
        born=_rows(groups, born, lives, room),
        dead=_rows(groups, dead, lives, room),
        lives=lives,
    )


def _rows(row: Ints, values: Ints, count: Ints, room: int) -> Ints:
    """Each row's values in order; no two of a resource overlap, so starts and ends have the same order."""
    order = np.lexsort((values, row))
    made = np.zeros((len(count), int(count.max()) + room), np.int64)
    made[row[order], np.arange(len(row)) - np.repeat(np.cumsum(count) - count, count)] = values[order]
    return made


@njit(cache=True)
def fill_in(
    begin: Ints,
    end: Ints,
    count: Ints,
    born: Ints,
    dead: Ints,
    lives: Ints,
    releases: Ints,
    wanted: int,
    latest: int,
    longest: int,
    apart: int,
    max_live: int,
    group: Ints,
    compute: Ints,
    duration: Ints,
    first: Ints,
    second: Ints,
    after: Ints,
    also: Ints,
) -> tuple[Ints, int]:
    """Place ``wanted`` more micro-batches beside what is ``Taken``, at ``releases`` or later, done by ``latest``.

    Within the cap. Each takes at most ``longest``, and leaves ``apart`` after the one before it or later.
    """
    steps = len(duration)
    by_group, bounds = np.argsort(group), np.searchsorted(np.sort(group), np.arange(len(lives) + 1))
    added = np.zeros((wanted, steps), np.int64)
    number, free = 0, -NEVER
    for release in releases:
        while number < wanted and release >= free:
            times, end_by = added[number], min(latest, release + longest)
            if not place(begin, end, count, NEVER, release, end_by, duration, first, second, after, also, times):
                break
            if not _fits_the_cap(born, dead, lives, by_group, bounds, compute, duration, times, max_live):
                give_back(begin, end, count, NEVER, duration, first, second, times, steps)
                break
            _live(born, dead, lives, group, compute, duration, times)
            number += 1
            free = times[0] + apart
    return added, number


@njit(cache=True)
def _live(born: Ints, dead: Ints, lives: Ints, group: Ints, compute: Ints, duration: Ints, times: Ints) -> None:
    """Note the activations of a micro-batch; one of no duration lives for a moment."""
    stages = len(group)
    for stage in range(stages):
        mine, last = group[stage], compute[2 * stages - 1 - stage]
        if mine < 0:
            continue
        begins = times[compute[stage]]
        for row, moment in ((born[mine], begins), (dead[mine], max(times[last] + duration[last], begins + 1))):
            at = lives[mine]
            while at > 0 and row[at - 1] > moment:
                row[at] = row[at - 1]
                at -= 1
            row[at] = moment
        lives[mine] += 1


@njit(cache=True)
def _fits_the_cap(
    born: Ints,
    dead: Ints,
    lives: Ints,
    by_group: Ints,
    bounds: Ints,
    compute: Ints,
    duration: Ints,
    times: Ints,
    max_live: int,
) -> bool:
    """Whether a micro-batch at ``times`` keeps every group within the cap."""
    stages = len(by_group)
    for mine in range(len(lives)):
        own_stages = by_group[bounds[mine] : bounds[mine + 1]]
        if len(own_stages) == 0:
            continue
        low, high = NEVER, -NEVER
        for stage in own_stages:
            last = compute[2 * stages - 1 - stage]
            low = min(low, times[compute[stage]])
            high = max(high, times[last] + duration[last])
        ended = np.searchsorted(dead[mine, : lives[mine]], low, side="right")
        started = np.searchsorted(born[mine, : lives[mine]], low, side="right")
        moment = low
        while moment < high:
            while ended < lives[mine] and dead[mine, ended] <= moment:
                ended += 1
            while started < lives[mine] and born[mine, started] <= moment:
                started += 1
            own, following = 0, high
            for stage in own_stages:
                last = compute[2 * stages - 1 - stage]
                begins, ends = times[compute[stage]], times[last] + duration[last]
                if begins <= moment < max(ends, begins + 1):
                    own += 1
                if begins > moment:
                    following = min(following, begins)
            if started - ended + own > max_live:
                return False
            if started < lives[mine]:
                following = min(following, born[mine, started])
            moment = following
    return True
