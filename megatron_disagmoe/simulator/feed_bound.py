"""A lower bound that counts slow neighbours: a group may have to wait for micro-batches that another is slow to run.

Take a group and its first stage s. Until the earliest moment e at which anything else could reach the group, it can
only run forwards of s. All those micro-batches came through an earlier stage u, one after the other: the k-th to begin
s (from 0) does so at (first forward of u) + (k + 1) (time of u) + (way from u to s) at the earliest. Where u takes
longer than s the group is idle in between. At the end it is the other way round: everything but the backwards of s must
have ended a time f before the end, and each of those is followed by a backward of u, one after the other.

With what the group can do at most before e and in the last f, the rest lies between: e + rest + f. With u as fast as s
that is the fill bound. It is more where an embedding makes A(0) longer than the stages that it feeds.
"""

from __future__ import annotations

import math
from itertools import accumulate

from megatron_disagmoe.simulator.workload import Paths, Workload


def feed_bound(workload: Workload) -> float:
    """The largest, over all groups and earlier stages, of the bound in the module's docstring.

    0 for a step without backwards, with split ones or with repeated dispatches: their ends are others.
    """
    if workload.forward_only or any(workload.split) or any(workload.again):
        return 0.0
    paths = Paths(workload)
    own: dict[int, list[int]] = {}
    for stage, group in enumerate(paths.groups):
        own.setdefault(group, []).append(stage)
    return max((_group(workload, paths, stages) for stages in own.values()), default=0.0)


def _group(workload: Workload, paths: Paths, stages: list[int]) -> float:
    """The bound of the group that has ``stages``."""
    n, first = workload.num_micro_batches, stages[0]
    e = min([paths.backward_start[s] for s in stages] + [paths.forward_start[s] for s in stages[1:]])
    f = min([paths.after_forward[s] for s in stages] + [paths.after_backward[s] for s in stages[1:]])
    forward = list(accumulate((t + edge for t, edge in zip(paths.forward, paths.edge, strict=False)), initial=0.0))
    backward = list(accumulate((t + edge for t, edge in zip(paths.backward, paths.edge, strict=False)), initial=0.0))
    head = e - paths.forward_start[first]
    tail = f - paths.after_backward[first]
    for feeder in range(first):
        way = forward[first] - forward[feeder] - paths.forward[feeder]
        begin = paths.forward_start[feeder] + way
        head = min(head, _most(n, e - begin, paths.forward[feeder], paths.forward[first]))
        way = backward[first] - backward[feeder] - paths.backward[feeder]
        after = paths.after_backward[feeder] + way
        tail = min(tail, _most(n, f - after, paths.backward[feeder], paths.backward[first]))
    work = n * sum(paths.forward[stage] + paths.backward[stage] for stage in stages)
    rest = work - max(head, 0.0) - max(tail, 0.0)
    return e + rest + f if rest > 1e-9 * work else 0.0


def _most(n: int, span: float, feeder: float, time: float) -> float:
    """The most that is done in ``span`` of ``n`` pieces of ``time``, the k-th (from 0) after (k + 1) ``feeder``."""
    if feeder <= 0:
        return n * min(time, max(0.0, span))
    whole = min(n, max(0, math.floor((span - time) / feeder)))  # so many have all their time
    begun = min(n, max(whole, math.ceil(span / feeder) - 1))  # and so many some of it
    part = (begun - whole) * span - feeder * (begun * (begun + 1) - whole * (whole + 1)) / 2
    return whole * time + part
