"""This rank's trace recorder (``--af-trace-dir``), its clock against rank 0's, the schedule kept beside the traces."""

from __future__ import annotations

import functools
from itertools import count
from pathlib import Path

import torch.distributed as dist
from megatron.training import get_args
from torch._C._distributed_c10d import Store
from torch.distributed.distributed_c10d import _get_default_store

from megatron_disagmoe import parallel_state
from megatron_disagmoe.schedules import text
from megatron_disagmoe.schedules.actions import Schedule
from megatron_disagmoe.tracing.clock import answer_clock_requests, measure_clock_offset
from megatron_disagmoe.tracing.predicted import SCHEDULE_FILE
from megatron_disagmoe.tracing.recorder import NullRecorder, Recorder, TraceRecorder


@functools.cache
def recorder() -> Recorder:
    """A ``TraceRecorder`` where traces were asked for, else one that keeps nothing.

    The first call is collective over the world where traces were asked for: clocks are compared.
    """
    args = get_args()
    if args.af_trace_dir is None:
        return NullRecorder()
    role = parallel_state.state().role
    found = TraceRecorder(args.rank, role.group, args.af_trace_dir, replica=role.replica)
    _compare_clocks(found)
    return found


def keep_schedule(schedule: Schedule) -> None:
    """Write the schedule of a training step beside the traces, once, where there are any."""
    args = get_args()
    if args.af_trace_dir is None or dist.get_rank() != 0:
        return
    path = Path(args.af_trace_dir) / SCHEDULE_FILE
    if path not in _kept:
        text.save(schedule, path)
        _kept.add(path)


_kept: set[Path] = set()


def _compare_clocks(mine: Recorder) -> None:
    """Every rank asks rank 0 for its time, over the store: it works whatever the backend is."""
    store, rank = _get_default_store(), dist.get_rank()
    if rank != 0:
        rounds = count()

        def exchange() -> int:
            key = f"af-clock/{rank}/{next(rounds)}"
            store.set(f"{key}/asked", "")
            return int(store.get(f"{key}/answered"))

        offset = measure_clock_offset(exchange)
        mine.clock_sync(offset.offset_ns, offset.at_ns)
        return
    mine.clock_sync(0)
    for other in range(1, dist.get_world_size()):
        _answer(store, other)


def _answer(store: Store, other: int) -> None:
    asked, answered = count(), count()
    answer_clock_requests(
        lambda: store.wait([f"af-clock/{other}/{next(asked)}/asked"]),
        lambda now: store.set(f"af-clock/{other}/{next(answered)}/answered", str(now)),
    )
