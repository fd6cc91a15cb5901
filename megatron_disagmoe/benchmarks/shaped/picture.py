"""Step time and speed-up against the link's bandwidth."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

#: Of AF-pipe's series those that are drawn in colour where they were measured; the others are thin and grey.
_FIRST_CHOICE = ("torch", "interleaved-1f1b")


def draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Two panels per number of hosts: steps in milliseconds (bars: minimum to maximum), and vanilla over each.

    The rivals (dashed) and each dispatch mode with one transport and schedule have colours and names.
    """
    hosts = sorted({row["hosts"] for row in rows})
    figure = Figure(figsize=(11, 4.2 * len(hosts)), layout="constrained")
    axes = figure.subplots(len(hosts), 2, squeeze=False)
    for count, panels in zip(hosts, axes, strict=True):
        _draw_hosts([row for row in rows if row["hosts"] == count], count, *panels)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def _draw_hosts(rows: Sequence[dict[str, Any]], hosts: int, times: Axes, ratios: Axes) -> None:
    links = list(dict.fromkeys(row["link_gbit_per_s"] for row in rows))
    for name in dict.fromkeys(map(_name, rows)):
        series = [row for row in rows if _name(row) == name]
        places = range(len(series))
        speedups = [row["vanilla_ms"] / row["step_ms"] for row in series]
        middle = [row["step_ms"] for row in series]
        if not _has_colour(series[0], rows):
            times.plot(places, middle, color="0.8", linewidth=0.6, zorder=0)
            ratios.plot(places, speedups, color="0.8", linewidth=0.6, zorder=0)
            continue
        spread = (
            [m - row["step_ms_min"] for m, row in zip(middle, series, strict=True)],
            [row["step_ms_max"] - m for m, row in zip(middle, series, strict=True)],
        )
        style = "-" if series[0]["system"] == "af-pipe" else "--"
        times.errorbar(places, middle, spread, label=name, linestyle=style, marker="o", markersize=3, capsize=2)
        ratios.plot(places, speedups, label=name, linestyle=style, marker="o", markersize=3)
    labels = ["unlimited" if link is None else f"{link:g}" for link in links]
    for panel, title in ((times, "step, ms"), (ratios, "vanilla's all-to-all step over this step")):
        panel.set_xticks(range(len(links)), labels)
        panel.set_xlabel("link, Gbit/s each way", fontsize=8)
        panel.set_title(f"{hosts} hosts: {title}", loc="left", fontsize=10)
        panel.grid(alpha=0.3)
        panel.set_ylim(bottom=0)
    ratios.axhline(1, color="black", linewidth=0.8)
    ratios.legend(fontsize=7, loc="upper left")


def _has_colour(row: dict[str, Any], rows: Sequence[dict[str, Any]]) -> bool:
    if row["system"] != "af-pipe":
        return True
    measured = {(other["transport"], other["schedule"]) for other in rows if other["system"] == "af-pipe"}
    chosen = _FIRST_CHOICE if _FIRST_CHOICE in measured else min(measured)
    return (row["transport"], row["schedule"]) == chosen


def _name(row: dict[str, Any]) -> str:
    parts = (row["system"], row["dispatch"], row["transport"], row["schedule"])
    return " ".join(part for part in parts if part)
