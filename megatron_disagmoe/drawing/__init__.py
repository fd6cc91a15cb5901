"""Drawings of timelines: PNG and SVG for papers, one self-contained HTML for people, a terminal view.

The suffix chooses::

    draw(timeline, "schedule.png", bounds={"fill_bound": 24.5})
    draw(timeline, "schedule.html")
    print_chart(chart_of(timeline), console)

matplotlib is imported only for pictures, so the HTML page and the terminal view work without it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from megatron_disagmoe.drawing.chart import Box, Chart, Row, chart_of
from megatron_disagmoe.drawing.html import write_html
from megatron_disagmoe.drawing.terminal import print_chart
from megatron_disagmoe.simulator.timeline import Timeline

__all__ = ["Box", "Chart", "Row", "chart_of", "draw", "draw_chart", "print_chart", "write_html"]

PICTURES = (".png", ".svg", ".pdf")
PAGES = (".html", ".htm")


def draw(
    timeline: Timeline,
    path: str | Path,
    *,
    bounds: Mapping[str, float] | None = None,
    heading: str | None = None,
    unit: str = "",
) -> None:
    """Draw ``timeline`` into ``path``; see ``chart_of`` for the arguments and ``draw_chart`` for errors."""
    draw_chart(chart_of(timeline, heading=heading, bounds=bounds, unit=unit), path)


def draw_chart(chart: Chart, path: str | Path) -> None:
    """Draw one chart, as the suffix of ``path`` says.

    Raises:
        ValueError: for a suffix we cannot draw, before anything is written.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix in PAGES:
        write_html([chart], path)
    elif suffix in PICTURES:
        from megatron_disagmoe.drawing.picture import write_picture

        write_picture(chart, path)
    else:
        raise ValueError(f"cannot draw {path.name}: its suffix should be one of {', '.join(PICTURES + PAGES)}")
