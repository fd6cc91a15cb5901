"""The picture of ``disagmoe bench schedule``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

Row = dict[str, Any]

#: Bound, simulated, measured: Okabe and Ito's colours.
_BARS = (("fill_bound_s", "lower bound", "#b3b3b3"), ("simulated_s", "simulated", "#0072b2"))
_MEASURED = "#d55e00"


def draw(rows: Sequence[Row], out: Path) -> None:
    """Step time of every case: lower bound, simulated, measured with its spread, and their ratio in words."""
    figure = Figure(figsize=(9, 0.62 * len(rows) + 1.2), layout="constrained")
    axis = figure.subplots()
    places = range(len(rows))
    height = 0.27
    for offset, (column, label, colour) in zip((-height, 0.0), _BARS, strict=True):
        axis.barh([y + offset for y in places], [row[column] for row in rows], height, label=label, color=colour)
    measured = [row["measured_s"] for row in rows]
    low = [row["measured_s"] - row["measured_min_s"] for row in rows]
    high = [row["measured_max_s"] - row["measured_s"] for row in rows]
    label = f"measured (median of {rows[0]['repeats']}, and spread)"
    axis.barh(
        [y + height for y in places], measured, height, xerr=(low, high), label=label, color=_MEASURED, capsize=2
    )
    for y, row in zip(places, rows, strict=True):
        text = f"  {row['measured_over_simulated']:.3f}x simulated"
        axis.text(row["measured_max_s"], y + height, text, va="center", fontsize=8)
    axis.set_yticks(list(places), [row["case"] for row in rows])
    axis.invert_yaxis()
    axis.set_xlim(0, 1.25 * max(row["measured_max_s"] for row in rows))
    axis.set_xlabel(f"seconds a step; a stage sleeps {rows[0]['stage_ms']:g} ms")
    figure.legend(loc="outside upper center", ncols=3, fontsize=8)
    figure.savefig(out, dpi=130)
