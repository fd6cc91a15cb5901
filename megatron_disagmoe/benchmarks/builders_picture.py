"""The picture of ``disagmoe bench builders``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

_HOLDS, _DOES_NOT, _BAR = "#0072b2", "#d55e00", "#000000"


def draw(rows: Sequence[dict[str, Any]], out: Path) -> None:
    """How far every schedule is above its bound, part by part; the bar of each part as a line."""
    parts = list(dict.fromkeys(row["part"] for row in rows))
    figure = Figure(figsize=(9, 0.42 * len(parts) + 1.4), layout="constrained")
    axis = figure.subplots()
    for y, part in enumerate(parts):
        mine = [row for row in rows if row["part"] == part]
        for row in mine:
            colour = _HOLDS if row["holds"] else _DOES_NOT
            axis.plot(100 * (row["over_bound"] - 1), y, "o", color=colour, alpha=0.6, markersize=5, clip_on=False)
        bar = 100 * (mine[0]["bar"] - 1)
        axis.plot([bar, bar], [y - 0.35, y + 0.35], color=_BAR, linewidth=1)
    axis.set_yticks(range(len(parts)), parts)
    axis.invert_yaxis()
    axis.set_xlim(left=0)
    axis.set_xlabel("makespan above the lower bound, % (lines: what was asked for)")
    axis.grid(axis="x", alpha=0.3)
    figure.savefig(out, dpi=130)
