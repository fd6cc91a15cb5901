"""Orders for a small cap on live activations: each micro-batch as fast as it can, as soon as the cap lets it leave.

One micro-batch after the other is laid into the timetable of all groups and ports, in gaps that the earlier ones left;
it never delays those. It may wait on its way, but only so long that it takes ``patience`` times as long as alone:
what waits holds activations, so where the cap sets the pace it had better leave later.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from megatron_disagmoe.builders.filling import fill_in, taken_by
from megatron_disagmoe.builders.paced import orders_of
from megatron_disagmoe.builders.timetable import NEVER, steps_of
from megatron_disagmoe.schedules.orders import Orders
from megatron_disagmoe.simulator.live_bound import hills
from megatron_disagmoe.simulator.workload import Paths, Workload

#: Moments to leave at, in the time of a micro-batch alone.
_FINE = 512
#: Patience, and time between two departures at least, as a share of the pace that the cap allows.
_WAYS = ((1.0, 0.0), (1.05, 0.0), (1.0, 0.3), (1.2, 0.5), (1.0, 0.95), (1.1, 0.95))
#: Steps that all ways together may place.
_EFFORT = 12_000_000


def packed(workload: Workload, max_live: int) -> Iterator[tuple[Orders, dict[str, object]]]:
    """Orders with whole backwards that keep within ``max_live``, and how each was made.

    ``max_live`` must be at least the stages of the fullest group.
    """
    if any(workload.split):
        workload = replace(workload, split=(0,) * len(workload.split))
    n, paths = workload.num_micro_batches, Paths(workload)
    steps = steps_of(paths)
    alone = int(steps.alone[-1] + steps.duration[-1])
    pace = max(float(hill.rise.sum() + hill.fall.sum()) for hill in hills(paths)) * steps.scale / max_live
    stride = max(1, alone // _FINE)
    none = np.zeros((0, len(steps.duration)), np.int64)
    effort = _EFFORT
    for patience, share in _WAYS:
        effort -= (n * alone // stride) * len(steps.duration) // 4
        if effort < 0:
            return
        taken = taken_by(none, steps, room=n * steps.busiest + 1)
        added, number = fill_in(
            *taken.arrays,
            np.arange(0, n * alone, stride),
            n,
            NEVER,
            int(patience * alone),
            int(share * pace),
            max_live,
            steps.keeps,
            steps.compute,
            steps.duration,
            steps.first,
            steps.second,
            steps.after,
            steps.also,
        )
        if number == n:
            about: dict[str, object] = {"patience": patience, "apart": share * pace / steps.scale}
            yield orders_of(workload.placement, n, steps, added), about
