"""Orders for a low cap on live activations: micro-batches leave at an even pace, and then wait as little as can be.

A cap limits how many micro-batches can be under way, so how fast each comes through decides (``simulator.live_bound``).
Here they do not fill the groups as fast as they can, but follow a circular timetable in which hardly anything waits.
Which periods allow that is a matter of number theory: forwards and backwards of different micro-batches must miss one
another on every group. So many periods are tried, with one to four micro-batches in each.

A timetable is slow to begin and to end: until the first backwards come back a group has room for more. So some
micro-batches are taken out of the rhythm and run where they fit in at either end, within the cap.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from megatron_disagmoe.builders.centred import Outward, centred
from megatron_disagmoe.builders.filling import fill_in, taken_by
from megatron_disagmoe.builders.search import LARGE
from megatron_disagmoe.builders.timetable import NEVER, Steps, circle, most_alive, steps_of
from megatron_disagmoe.schedules.actions import Placement
from megatron_disagmoe.schedules.orders import B, F, Ints, Orders, sorted_orders
from megatron_disagmoe.simulator.live_bound import hills
from megatron_disagmoe.simulator.workload import Paths, Workload

#: Micro-batches in one period, at most.
_MEMBERS = 4
#: Periods to try: up to this multiple of the shortest that could do, in these steps.
_LONGEST, _STEP = 1.6, 1.006
#: Distances between the micro-batches of one period, as shares of it, beside those that the stages suggest.
_SHARES = np.linspace(0.02, 0.5, 13)
#: Timetables laid from the middle outwards: how many are taken, steps that all may place, tries for a period at first
#: and then, and so many periods before the first that does.
_CENTRES, _CENTRED, _FEW, _MANY, _BEFORE = 3, 10_000_000, 150, 1500, 12
#: Steps that a search may place, that filling in at the ends of all timetables may, and to try one more filling.
_EFFORT, _FILLING, _TRY = 6_000_000, 12_000_000, 300_000
#: What it costs to note a step that is planned already, in steps placed.
_NOTED = 16
#: Timetables that are filled in, and micro-batches taken out of the rhythm at most.
_BEST, _TAKEN_OUT = 4, 16


@dataclass(frozen=True)
class Timetable:
    """Starts of all steps of the micro-batches of one period.

    ``makespan``: of all micro-batches of a step, filled in nowhere. All in ticks.
    """

    times: Ints
    releases: Ints
    period: int
    makespan: int

    def plan(self, number: int) -> Ints:
        """Starts of all steps of the first ``number`` micro-batches."""
        members = len(self.releases)
        micro_batch = np.arange(number)
        return self.times[micro_batch % members] + (micro_batch // members * self.period)[:, None]


def paced(workload: Workload, max_live: int) -> Iterator[tuple[Orders, dict[str, object]]]:
    """Orders with whole backwards that keep within ``max_live``, the most promising first, and how each was made.

    ``max_live`` must be at least the stages of the fullest group.
    """
    if any(workload.split):
        workload = replace(workload, split=(0,) * len(workload.split))
    placement, n, paths = workload.placement, workload.num_micro_batches, Paths(workload)
    steps = steps_of(paths)
    effort = _FILLING
    periods = _periods(paths, steps, max_live)
    greedy, laid = timetables(paths, steps, periods, max_live), outward(paths, steps, periods, max_live)
    for timetable in sorted(greedy[:_BEST] + laid[:_CENTRES], key=lambda timetable: timetable.makespan):
        about: dict[str, object] = {
            "period": timetable.period / steps.scale / len(timetable.releases),
            "members": len(timetable.releases),
        }
        yield orders_of(placement, n, steps, timetable.plan(n)), about
        filled, effort = _filled(timetable, steps, n, max_live, effort)
        if filled is not None:
            times, taken_out = filled
            yield orders_of(placement, n, steps, times), {**about, "taken_out": taken_out}


def orders_of(placement: Placement, n: int, steps: Steps, times: Ints) -> Orders:
    """Every group's actions in order of their start; of those at one moment, each after what it needs."""
    stages = len(steps.group)
    starts = times[:, steps.compute].T.ravel()  # action after action, each for every micro-batch
    stage = np.concatenate((np.arange(stages), np.arange(stages)[::-1]))
    return sorted_orders(
        placement,
        num_micro_batches=n,
        forward_only=False,
        kind=np.repeat((F, B), stages * n),
        stage=np.repeat(stage, n),
        micro_batch=np.tile(np.arange(n), 2 * stages),
        keys=(starts, np.repeat(np.arange(2 * stages), n)),
    )


def timetables(paths: Paths, steps: Steps, periods: list[int], max_live: int) -> list[Timetable]:
    """Those within the cap in which every step is as early as it can be, the shortest first."""
    n, alone = paths.workload.num_micro_batches, int(steps.alone[-1] + steps.duration[-1])
    found: list[Timetable] = []
    effort, best, laps = _EFFORT, NEVER, _laps(steps)
    for period in periods:
        if effort <= 0 or (n - 1) * period + alone >= best:
            break
        for members in range(1, min(_MEMBERS, n) + 1):
            for apart in _distances(steps, laps, members * period) if members > 1 else [0]:
                effort -= members * len(steps.duration)
                timetable = _timetable(steps, np.arange(members) * apart, members * period, n, max_live)
                if timetable is not None:
                    found.append(timetable)
                    best = min(best, timetable.makespan)
    return sorted(found, key=lambda timetable: timetable.makespan)


def outward(paths: Paths, steps: Steps, periods: list[int], max_live: int) -> list[Timetable]:
    """Those within the cap that are laid from the middle of the way outwards, the shortest period first.

    With few tries from the shortest period on until one is found; then with many for the periods just before that.
    """
    n, order = paths.workload.num_micro_batches, Outward.of(steps)
    size = 2 * n * len(steps.group)
    if size > 2 * LARGE:  # no time for enough of them to find one
        return []
    effort = _CENTRED // 4 if size > LARGE else _CENTRED
    found: list[Timetable] = []

    def has(period: int, tries: int) -> bool:
        nonlocal effort
        effort -= tries * len(steps.duration)
        times = centred(steps, order, period, max_live, tries)
        if times is not None:
            end = int(times[-1] + steps.duration[-1]) + (n - 1) * period
            found.append(Timetable(times[None, :], np.zeros(1, np.int64), period, end))
        return times is not None

    first = next((at for at, period in enumerate(periods) if effort > 0 and has(period, _FEW)), 0)
    for period in periods[max(0, first - _BEFORE) : first][::-1]:
        if effort > 0:
            has(period, _MANY)
    return sorted(found, key=lambda timetable: timetable.period)


def _timetable(steps: Steps, releases: Ints, period: int, n: int, max_live: int) -> Timetable | None:
    times, fits = circle(releases, period, steps.num_groups, steps.busiest, *steps.needs)
    if not fits:
        return None
    if most_alive(times, period, steps.num_groups, steps.keeps, steps.duration, steps.compute) > max_live:
        return None
    laps = (n - 1 - np.arange(len(releases))) // len(releases)
    ends = times[:, -1] + steps.duration[-1] + laps * period
    return Timetable(times, releases, period, int(ends.max()))


def _periods(paths: Paths, steps: Steps, max_live: int) -> list[int]:
    """Periods per micro-batch to try, the shortest first.

    No shorter than the busiest resource needs, nor than the cap allows; some of them sums of laps.
    """
    lives = max(float(hill.rise.sum() + hill.fall.sum()) for hill in hills(paths)) * steps.scale
    shortest = max(steps.work, math.ceil(lives / max_live))
    count = math.floor(math.log(_LONGEST) / math.log(_STEP)) + 1
    tried = {round(shortest * _STEP**step) for step in range(count)}
    for up, down in _laps(steps):
        for x, y, z in itertools.product(range(5), range(5), range(1, 5)):
            total, rest = divmod(x * up + y * down, z)
            if shortest <= total <= _LONGEST * shortest:
                tried.add(total + (rest > 0))
    return sorted(tried)


def _laps(steps: Steps) -> set[tuple[int, int]]:
    """Time from one stage of a group to its next, forward and backward; two pairs at most, of the fullest groups."""
    stages = len(steps.group)
    counts = np.bincount(steps.group)
    laps: set[tuple[int, int]] = set()
    for number in np.flatnonzero(counts == counts.max()).tolist():
        low, high = (np.flatnonzero(steps.group == number)[:2].tolist() * 2)[:2]
        starts = steps.alone[steps.compute]
        up, down = starts[high] - starts[low], starts[2 * stages - 1 - low] - starts[2 * stages - 1 - high]
        if up > 0:
            laps.add((int(up), int(down)))
    return set(sorted(laps)[:2])


def _distances(steps: Steps, laps: set[tuple[int, int]], period: int) -> list[int]:
    """Distances between the micro-batches of one period to try."""
    first, second = (int(steps.duration[steps.compute[stage]]) for stage in (0, 1))
    tried = {round(share * period) for share in _SHARES.tolist()} | {first, second, 2 * first}
    for up, down in laps:
        tried |= {up, down, up + down, 2 * up + down, up + 2 * down}
    return sorted(time for time in tried if 0 < time < period)


def _filled(
    timetable: Timetable, steps: Steps, n: int, max_live: int, effort: int
) -> tuple[tuple[Ints, int] | None, int]:
    """All steps with as many micro-batches taken out of the rhythm as fit in elsewhere, None where none do.

    And what is left of ``effort``.
    """
    alone = int((timetable.times[:, -1] + steps.duration[-1] - timetable.releases).max())
    pace = timetable.period // len(timetable.releases)
    stride = max(1, pace // 8, 3 * alone * len(steps.duration) // _TRY)
    best: tuple[Ints, int] | None = None
    for taken_out in range(1, min(_TAKEN_OUT, n - 1) + 1):
        plan = timetable.plan(n - taken_out)
        latest = int(plan[:, -1].max()) + int(steps.duration[-1])
        releases = np.arange(0, latest, stride)
        releases = releases[(releases < alone) | (releases > latest - 2 * alone)]
        effort -= (_NOTED * len(plan) + len(releases)) * len(steps.duration)
        if effort <= 0:
            break
        taken = taken_by(plan, steps, room=taken_out * steps.busiest + 1)
        added, number = fill_in(
            *taken.arrays,
            releases,
            taken_out,
            latest,
            NEVER,
            0,
            max_live,
            steps.keeps,
            steps.compute,
            steps.duration,
            steps.first,
            steps.second,
            steps.after,
            steps.also,
        )
        if number < taken_out:
            break
        best = np.concatenate((plan, added)), taken_out
    return best, effort
