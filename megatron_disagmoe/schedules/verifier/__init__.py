"""Proves a schedule safe before any process starts, or says what is wrong with it and where."""

from megatron_disagmoe.schedules.verifier.check import DEFAULT_MAX_POSTED, Report, ensure_safe, verify
from megatron_disagmoe.schedules.verifier.faults import Fault, FaultKind, Place, UnsafeScheduleError
from megatron_disagmoe.schedules.verifier.grid import draw_grid

__all__ = [
    "DEFAULT_MAX_POSTED",
    "Fault",
    "FaultKind",
    "Place",
    "Report",
    "UnsafeScheduleError",
    "draw_grid",
    "ensure_safe",
    "verify",
]
