"""The part of a schedule around a fault, drawn with the fault marked."""

from __future__ import annotations

from megatron_disagmoe.schedules.actions import Schedule
from megatron_disagmoe.schedules.table import Place
from megatron_disagmoe.schedules.verifier.faults import Fault, describe

_MAX_ROWS = 8


def draw_grid(schedule: Schedule, fault: Fault, *, around: int = 4) -> str:
    """A row for each stretch of actions with a marked place; marked actions stand in brackets with carets below.

    The first mark of each row stands in the middle column, ``around`` actions on either side of it. The number behind
    the group is the middle action's position in its list. Empty where the fault has no place (work that is nowhere).
    """
    rows: list[tuple[Place, set[int]]] = []
    for place in fault.marks:
        for middle, marked in rows:
            if place.group == middle.group and abs(place.index - middle.index) <= around:
                marked.add(place.index)
                break
        else:
            rows.append((place, {place.index}))
    shown = rows[:_MAX_ROWS]
    cells = [
        [_cell(schedule, middle, middle.index + offset, marked, around) for offset in range(-around - 1, around + 2)]
        for middle, marked in shown
    ]
    widths = [max(len(row[column]) for row in cells) for column in range(2 * around + 3)] if cells else []
    names = [f"{middle.group} #{middle.index}" for middle, _ in shown]
    margin = max(map(len, names), default=0)
    lines: list[str] = []
    for name, row in zip(names, cells, strict=True):
        text = " ".join(cell.center(width) for cell, width in zip(row, widths, strict=True))
        lines.append(f"{name:<{margin}} | {text}".rstrip())
        carets = " ".join(
            ("^" * len(cell) if cell.startswith("[") else "").center(width)
            for cell, width in zip(row, widths, strict=True)
        )
        lines.append(f"{'':<{margin}} | {carets}".rstrip())
    if len(rows) > len(shown):
        lines.append(f"({len(rows) - len(shown)} more groups not shown)")
    return "\n".join(lines)


def _cell(schedule: Schedule, middle: Place, index: int, marked: set[int], around: int) -> str:
    actions = schedule.actions[middle.group]
    if not 0 <= index < len(actions):
        return ""
    if abs(index - middle.index) > around:
        return "..."  # the list goes on
    text = describe(actions[index])
    return f"[{text}]" if index in marked else text
