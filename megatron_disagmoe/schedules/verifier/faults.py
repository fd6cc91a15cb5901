"""What can be wrong with a schedule."""

from __future__ import annotations

import enum
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from megatron_disagmoe.schedules.actions import Action, Group
from megatron_disagmoe.schedules.table import Place
from megatron_disagmoe.schedules.text import action_text


class FaultKind(enum.Enum):
    """Every kind of fault the verifier knows; docs/schedules.md explains each with an example."""

    IMPOSSIBLE_ACTION = "impossible-action"
    WRONG_GROUP = "wrong-group"
    MISSING_WORK = "missing-work"
    REPEATED_WORK = "repeated-work"
    BACKWARD_BEFORE_FORWARD = "backward-before-forward"
    WEIGHTS_BEFORE_INPUTS = "weights-before-inputs"
    REDISPATCH_OUT_OF_ORDER = "redispatch-out-of-order"
    HANDOVER_OUT_OF_ORDER = "handover-out-of-order"
    MISSING_TRANSFER = "missing-transfer"
    MISSING_SEND = "missing-send"
    MISSING_RECEIVE = "missing-receive"
    ORPHAN_SEND = "orphan-send"
    DUPLICATE_RECEIVE = "duplicate-receive"
    SEND_BEFORE_WORK = "send-before-work"
    RECEIVE_AFTER_USE = "receive-after-use"
    FIFO_SWAP = "fifo-swap"
    TOO_MANY_POSTED = "too-many-posted"
    DEADLOCK = "deadlock"
    LIVE_OVER_CAP = "live-over-cap"


@dataclass(frozen=True)
class Fault:
    """One thing that is wrong.

    ``group`` and ``action`` name what is wrong or, for missing work, what is not there; ``marks`` are the places in the
    schedule to look at, the worst first.
    """

    kind: FaultKind
    group: Group
    action: Action
    message: str
    marks: tuple[Place, ...]

    def __str__(self) -> str:
        return f"{self.group}: {self.kind.value}: {self.message}"

    def to_json(self, grid: str) -> dict[str, object]:
        """Plain values for ``--json``."""
        return {
            "rank": str(self.group),
            "action": describe(self.action),
            "kind": self.kind.value,
            "message": self.message,
            "places": [{"rank": str(place.group), "index": place.index} for place in self.marks],
            "grid": grid,
        }


class UnsafeScheduleError(ValueError):
    """A schedule that the verifier refuses; the message holds the faults and their grids."""


def describe(action: Action) -> str:
    """The action's text, also where it is malformed and has none."""
    try:
        return action_text(action)
    except ValueError:
        return repr(tuple(action))


class Findings:
    """Collects faults, at most ``limit`` of each kind in full; all of them are counted."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.faults: list[Fault] = []
        self.counts: dict[FaultKind, int] = {}
        self._shown: dict[FaultKind, int] = {}

    def add(self, kind: FaultKind, group: Group, action: Action, message: str, *, marks: Iterable[Place] = ()) -> None:
        """Record one fault."""
        self.counts[kind] = self.counts.get(kind, 0) + 1
        if self._room(kind):
            self._shown[kind] = self._shown.get(kind, 0) + 1
            self.faults.append(Fault(kind, group, action, message, tuple(marks)))

    def _room(self, kind: FaultKind) -> int:
        return self.limit - self._shown.get(kind, 0)

    def first(self, kind: FaultKind, where: npt.NDArray[np.bool_]) -> list[int]:
        """Indices of the true entries to report with ``add``; the rest are only counted."""
        indices = np.flatnonzero(where)
        shown = indices[: self._room(kind)]
        if len(indices) > len(shown):
            self.counts[kind] = self.counts.get(kind, 0) + len(indices) - len(shown)
        return [int(index) for index in shown]
