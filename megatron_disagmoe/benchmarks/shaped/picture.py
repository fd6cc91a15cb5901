"""Step time and speed-up against the link's bandwidth."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure


def draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Two panels per number of hosts: steps in milliseconds (bars: minimum to maximum), and vanilla over each."""
    hosts = sorted({row["hosts"] for row in rows})
    figure = Figure(figsize=(13, 4.8 * len(hosts)), layout="constrained")
    axes = figure.subplots(len(hosts), 2, squeeze=False)
    for count, (times, ratios) in zip(hosts, axes, strict=True):
        mine = [row for row in rows if row["hosts"] == count]
        links = list(dict.fromkeys(row["link_gbit_per_s"] for row in mine))
        for name in dict.fromkeys(map(_name, mine)):
            series = [row for row in mine if _name(row) == name]
            middle = [row["step_ms"] for row in series]
            spread = (
                [m - row["step_ms_min"] for m, row in zip(middle, series, strict=True)],
                [row["step_ms_max"] - m for m, row in zip(middle, series, strict=True)],
            )
            style = "-" if series[0]["system"] == "af-pipe" else "--"
            places = range(len(series))
            times.errorbar(places, middle, spread, label=name, linestyle=style, marker="o", markersize=3, capsize=2)
            speedups = [row["vanilla_ms"] / row["step_ms"] for row in series]
            ratios.plot(places, speedups, label=name, linestyle=style, marker="o", markersize=3)
        labels = ["unlimited" if link is None else f"{link:g} Gbit/s" for link in links]
        for panel, title in ((times, "step, ms"), (ratios, "vanilla's all-to-all step over this step")):
            panel.set_xticks(range(len(links)), labels)
            panel.set_title(f"{count} hosts: {title}", loc="left", fontsize=10)
            panel.grid(alpha=0.3)
            panel.set_ylim(bottom=0)
        ratios.axhline(1, color="black", linewidth=0.8)
        ratios.legend(fontsize=7, loc="upper left")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def _name(row: dict[str, Any]) -> str:
    parts = (row["system"], row["dispatch"], row["transport"], row["schedule"])
    return " ".join(part for part in parts if part)
