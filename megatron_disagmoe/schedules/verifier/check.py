"""The verifier's front: all checks, one report."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_disagmoe.schedules.actions import Group, Schedule
from megatron_disagmoe.schedules.dataflow import Channel
from megatron_disagmoe.schedules.liveness import lifetimes, live_counts
from megatron_disagmoe.schedules.lowering import lowered
from megatron_disagmoe.schedules.table import Place, Table
from megatron_disagmoe.schedules.verifier.deadlock import check_deadlock
from megatron_disagmoe.schedules.verifier.faults import Fault, FaultKind, Findings, UnsafeScheduleError, describe
from megatron_disagmoe.schedules.verifier.grid import draw_grid
from megatron_disagmoe.schedules.verifier.transfers import check_transfers
from megatron_disagmoe.schedules.verifier.work import check_work


@dataclass(frozen=True)
class Report:
    """What the verifier found.

    ``faults`` holds at most ``limit`` of each kind, ``counts`` how many there are. ``schedule`` is what was verified:
    with its transfers, also where they had to be derived first.
    """

    schedule: Schedule
    faults: tuple[Fault, ...]
    counts: dict[FaultKind, int]
    peak_live: dict[Group, int]
    peak_posted: dict[Channel, int]

    @property
    def ok(self) -> bool:
        """True where the schedule is safe to run."""
        return not self.counts

    @property
    def num_actions(self) -> int:
        """Actions of all groups, transfers included."""
        return sum(map(len, self.schedule.actions.values()))

    def explain(self) -> str:
        """Every fault with the grid around it, for people."""
        parts = []
        for fault in self.faults:
            grid = draw_grid(self.schedule, fault)
            parts.append(f"{fault}\n\n{grid}\n" if grid else f"{fault}\n")
        for kind, count in self.counts.items():
            shown = sum(fault.kind is kind for fault in self.faults)
            if count > shown:
                parts.append(f"{kind.value}: {count - shown} more not shown\n")
        return "\n".join(parts)


def verify(
    schedule: Schedule, *, max_live: int | None = None, max_posted: int | None = None, limit: int = 10
) -> Report:
    """Check everything that can go wrong when processes run ``schedule``.

    The semantics are the strictest that a transport may have: a SEND blocks until its receive is posted, so posted
    receives are all the buffers there are; messages of one channel (edge, direction, sender, receiver) match in order.
    Deadlock is looked for once everything else about work and transfers holds. A schedule without any transfer is
    lowered first, as the executor does.

    Args:
        schedule: with or without its transfers.
        max_live: cap on the activations alive on any group (see ``liveness``); none by default.
        max_posted: bound on the receives outstanding on one channel, which is to say on a transport's buffers; by
            default they are only counted (``Report.peak_posted``).
        limit: how many faults of one kind are reported in full.

    Raises:
        ValueError: where a bound is below 1.
    """
    for name, bound in (("max_live", max_live), ("max_posted", max_posted), ("limit", limit)):
        if bound is not None and bound < 1:
            raise ValueError(f"{name} is {bound}; it must be at least 1")
    schedule = lowered(schedule)
    found = Findings(limit)
    table = Table(schedule)
    work = check_work(table, found)
    transfers = check_transfers(table, work, found, max_posted=max_posted)
    if not found.counts.keys() - {FaultKind.TOO_MANY_POSTED}:
        check_deadlock(table, transfers, found)
    peak_live = _check_live(schedule, found, max_live)
    return Report(schedule, tuple(found.faults), found.counts, peak_live, transfers.peak_posted)


def ensure_safe(schedule: Schedule, *, max_live: int | None = None, max_posted: int | None = None) -> Report:
    """``verify``, for callers that cannot go on with a fault.

    Raises:
        UnsafeScheduleError: with every fault and the grid around it.
    """
    report = verify(schedule, max_live=max_live, max_posted=max_posted)
    if not report.ok:
        raise UnsafeScheduleError(f"the schedule is not safe to run:\n\n{report.explain()}")
    return report


def _check_live(schedule: Schedule, found: Findings, max_live: int | None) -> dict[Group, int]:
    peaks: dict[Group, int] = {}
    for group, lives in lifetimes(schedule).items():
        counts = live_counts(lives, len(schedule.actions[group]))
        peaks[group] = max(counts, default=0)
        if max_live is not None and peaks[group] > max_live:
            at = next(index for index, count in enumerate(counts) if count > max_live)
            action = schedule.actions[group][at]
            message = (
                f"{describe(action)} makes {counts[at]} activations live, the cap is {max_live} "
                f"(the peak of {group} is {peaks[group]})"
            )
            found.add(FaultKind.LIVE_OVER_CAP, group, action, message, marks=(Place(group, at),))
    return peaks
