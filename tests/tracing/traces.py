"""Traces made by hand: two ranks, one layer, one micro-batch a step, every figure known.

In one step, times in microseconds from its start (``p`` posts, ``s`` sees complete)::

    rank 0, A0   F A(0) 0-20 | wait N2M 20-60              | F A(1) 60-90           step 0-100
                 send M2N 20-30; receive N2M p5 s60
    rank 1, F0   wait M2N 4-30 | F F(0) 30-50                                       step 2-98
                 receive M2N p3 s30; send N2M 50-62

Rank 0 computes 50, waits 30 for F(0) and 10 for the network, and sends for 10. Rank 1 computes 20, waits 16
for A(0) and 10 for the network, and sends for 10 (62 is late: the receiver had it at 60).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from megatron_disagmoe.schedules.actions import Action, Group, Kind, Placement, Schedule, Side
from megatron_disagmoe.tracing.recorder import TraceRecorder

A0, F0 = Group(Side.A, 0), Group(Side.F, 0)
MICRO = 1000
PERIOD = 200 * MICRO

#: What to add to each rank's clock to have rank 0's.
OFFSETS = (0, -5_000_000_000)


def record_step(recorders: Sequence[TraceRecorder], iteration: int, *, stretch: int = 1) -> None:
    """One step, begun at ``iteration * PERIOD * 10`` of rank 0's clock; ``stretch`` multiplies every time in it."""
    origin = 10_000_000_000 + iteration * PERIOD * 10

    def at(rank: int, start: int, end: int) -> tuple[int, int]:
        zero = origin - OFFSETS[rank]
        return zero + stretch * MICRO * start, zero + stretch * MICRO * end

    a, f = recorders
    a.compute(Action(Kind.F, 0, 0), *at(0, 0, 20))
    a.wait("N2M", 0, 0, 1, *at(0, 20, 60))
    a.receive("N2M", 0, 0, 1, *at(0, 5, 60), 4096)
    a.compute(Action(Kind.F, 1, 0), *at(0, 60, 90))
    a.send("M2N", 0, 0, 1, *at(0, 20, 30), 4096)  # seen complete late, so recorded late
    a.step(iteration, *at(0, 0, 100))
    f.receive("M2N", 0, 0, 0, *at(1, 3, 30), 4096)
    f.wait("M2N", 0, 0, 0, *at(1, 4, 30))
    f.compute(Action(Kind.F, 0, 0), *at(1, 30, 50))
    f.send("N2M", 0, 0, 0, *at(1, 50, 62), 4096)
    f.step(iteration, *at(1, 2, 98))


def record(directory: Path, stretches: Sequence[int]) -> None:
    """A run with one step for each of ``stretches``."""
    recorders = [TraceRecorder(0, A0, directory), TraceRecorder(1, F0, directory)]
    for recorder, offset in zip(recorders, OFFSETS, strict=True):
        recorder.clock_sync(offset, 10_000_000_000 - offset)
    for iteration, stretch in enumerate(stretches):
        record_step(recorders, iteration, stretch=stretch)
    for recorder in recorders:
        recorder.close()


def schedule() -> Schedule:
    """The schedule that the traces follow."""
    return Schedule(
        placement=Placement.round_robin(num_layers=1, num_attention_groups=1, num_ffn_groups=1),
        num_micro_batches=1,
        forward_only=True,
        actions={A0: (Action(Kind.F, 0, 0), Action(Kind.F, 1, 0)), F0: (Action(Kind.F, 0, 0),)},
        parameters={"kind": "by-hand"},
    )
