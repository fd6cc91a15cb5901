"""How long a step takes at least because activations must live: lower bounds under a cap.

On one group, take the stages whose activations live from forward to backward, and for each micro-batch the *pivot*: the
moment at which the last of those stages begins its forward. However the step is ordered, the activation of stage s
lives at least from ``rise[s]`` before the pivot to ``fall[s]`` after it: a micro-batch alone in the machine is no
faster. So a micro-batch weighs at least ``h(t - pivot)`` on the group, a hill that rises by one stage after the other
and falls the other way round, and the hills of all n micro-batches may nowhere add up to more than the cap K.

**Spread.** Let A be the area of a hill. Then n A <= K (makespan), which is Little's law; and more, since the first hill
begins and the last one ends with a slope. Weigh time with w(t) = 1/A between two moments x0 and y0, and put extra
weight q on x0 and r on y0, just enough for the weight under every possible hill to be at least 1. Summed over all hills
that makes n <= K (q + (y0 - x0)/A + r). A hill that is at its height h at x0, with the area a behind it, needs
q h >= a/A. With x0 at the foot of the first possible hill plus x, q A is the largest a/h over the first x of a hill,
and makespan >= n A/K + (x - q A) + (y - r A) + (time before the first and after the last possible hill), for every x
and y up to the summit. For a hill that is a triangle each gain is half the length of a slope.

**Pivots.** At every pivot the hills add up to at most K. Summed over all n pivots p(1) <= p(2) <= ... that is
n v + (sum over k >= 1 and m of s(p(m+k) - p(m))) <= n K, where v is the number of stages and s(d) = h(d) + h(-d) falls
with d. Let c be the largest convex function that is nowhere above s. The mean of c over the n - k pairs that are k
apart is at least c of their mean distance, and that is at most k D/(n - k), where D is the time from the first pivot to
the last. So D is at least what solves: sum over k of (n - k) c(k D/(n - k)) = n (K - v). This is the stronger one for
small caps: at K = v no two hills may overlap.

A stage that takes no time (a tail that costs nothing) has no part in a hill, but counts in v: an order keeps its
activation for a moment.
"""

from __future__ import annotations

import math
from itertools import accumulate
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from megatron_disagmoe.simulator.workload import Paths

Floats = NDArray[np.float64]

_BISECTIONS = 60


class Hill(NamedTuple):
    """What a micro-batch weighs on a group: stage s from ``rise[s]`` before the pivot to ``fall[s]`` after it.

    ``before``: earliest pivot; ``after``: least time from a pivot to the end of the step.
    """

    rise: Floats
    fall: Floats
    before: float
    after: float


def live_bound(paths: Paths, max_live: int) -> float:
    """No step that keeps at most ``max_live`` activations alive on every group is shorter.

    Raises:
        ValueError: where a single micro-batch needs more.
    """
    n = paths.workload.num_micro_batches
    return max((max(spread(hill, n, max_live), pivots(hill, n, max_live)) for hill in hills(paths)), default=0.0)


def hills(paths: Paths) -> list[Hill]:
    """The hill of every group that keeps activations; stages that are dispatched again are left out."""
    workload = paths.workload
    # along the chain of stages, lanes aside: when F and then B (or I) of each can begin
    forward = list(accumulate((f + e for f, e in zip(paths.forward, paths.edge, strict=False)), initial=0.0))
    turn = forward[-1] + paths.forward[-1]
    steps = [b + e for b, e in zip(reversed(paths.backward), reversed(paths.edge), strict=False)]
    backward = list(accumulate(steps, initial=turn))[::-1]
    kept: dict[int, list[int]] = {}
    for stage, group in enumerate(paths.groups):
        if not workload.dropped(stage):
            kept.setdefault(group, []).append(stage)
    result = []
    for stages in kept.values():
        pivot = stages[-1]
        whole = [workload.split[stage] == workload.num_micro_batches for stage in stages]
        ends = [
            backward[s] + paths.backward[s] + (paths.weights[s] if w else 0.0)
            for s, w in zip(stages, whole, strict=True)
        ]
        result.append(
            Hill(
                rise=np.array([forward[pivot] - forward[s] for s in stages]),
                fall=np.array(ends) - forward[pivot],
                before=paths.forward_start[pivot],
                after=paths.forward[pivot] + paths.after_forward[pivot],
            )
        )
    return result


def spread(hill: Hill, n: int, max_live: int) -> float:
    """See the module's docstring."""
    _check(hill, max_live)
    area = float(hill.rise.sum() + hill.fall.sum())
    left, right = float(hill.rise.max()), float(hill.fall.max())
    outside = max(0.0, hill.before - left) + max(0.0, hill.after - right)
    return n * area / max_live + outside + _gain(left - hill.rise) + _gain(right - hill.fall)


def _gain(begins: Floats) -> float:
    """The most, over x up to the summit, of x less the largest (area so far) / (height) on the way to x.

    ``begins``: when the stages join, from the foot of the slope on.
    """
    largest = area = best = at = 0.0
    for height, begin in enumerate(np.sort(begins).tolist()):
        if begin > at:
            area += height * (begin - at)
            at = begin
            largest = max(largest, area / height)
            best = max(best, at - largest)
    return best


def pivots(hill: Hill, n: int, max_live: int) -> float:
    """See the module's docstring."""
    _check(hill, max_live)
    if n == 1:
        return hill.before + hill.after
    distance, weight = _convex_floor(hill)
    apart = np.arange(1, n)
    room = n * (max_live - len(hill.rise))
    low, high = 0.0, float(n * distance[-1])
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        needed = float(((n - apart) * np.interp(apart * middle / (n - apart), distance, weight, right=0.0)).sum())
        low, high = (low, middle) if needed <= room else (middle, high)
    return hill.before + low + hill.after


def _convex_floor(hill: Hill) -> tuple[Floats, Floats]:
    """Corners of the largest convex function nowhere above s(d) = h(d) + h(-d); it is 0 from the last corner on."""
    steps = np.unique(np.concatenate(([0.0], hill.rise, hill.fall)))
    # s is a step function; just behind a step it has its lowest value so far
    values = [int((hill.fall > step).sum() + (hill.rise > step).sum()) for step in steps.tolist()]
    corners: list[tuple[float, float]] = []
    for x, y in zip(steps.tolist(), values, strict=True):
        while len(corners) > 1 and _turns_down(corners[-2], corners[-1], (x, y)):
            corners.pop()
        corners.append((x, float(y)))
    return np.array([x for x, _ in corners]), np.array([y for _, y in corners])


def _turns_down(a: tuple[float, float], b: tuple[float, float], c: tuple[float, float]) -> bool:
    return (b[1] - a[1]) * (c[0] - a[0]) >= (c[1] - a[1]) * (b[0] - a[0])


def _check(hill: Hill, max_live: int) -> None:
    if max_live < len(hill.rise):
        raise ValueError(f"no order keeps within {max_live} live activations: one micro-batch needs {len(hill.rise)}")
    assert math.isfinite(hill.before + hill.after)
