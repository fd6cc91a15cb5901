"""Proves a schedule safe before any process starts, or says what is wrong with it and where."""

from megatron_disagmoe.schedules.table import Place
from megatron_disagmoe.schedules.verifier.check import Report, ensure_safe, verify
from megatron_disagmoe.schedules.verifier.faults import Fault, FaultKind, UnsafeScheduleError
from megatron_disagmoe.schedules.verifier.grid import draw_grid

__all__ = [
    "Fault",
    "FaultKind",
    "Place",
    "Report",
    "UnsafeScheduleError",
    "draw_grid",
    "ensure_safe",
    "verify",
]
