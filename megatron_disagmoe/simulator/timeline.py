"""When each action of a schedule ran, simulated or measured: what drawings and reports read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from megatron_disagmoe.schedules.actions import Action, Group, Schedule


class Span(NamedTuple):
    """One action with its start and end, in the time unit of the stage costs (seconds when measured)."""

    action: Action
    start: float
    end: float


@dataclass(frozen=True)
class Timeline:
    """The spans of every group, in order of start.

    ``compute`` holds F/B/I/W; ``transfers`` holds SEND actions under the *sending* group, the span being
    the time the transfer occupies the sender's port.
    """

    schedule: Schedule
    compute: dict[Group, tuple[Span, ...]]
    transfers: dict[Group, tuple[Span, ...]]
    makespan: float
