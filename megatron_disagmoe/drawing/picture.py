"""Pictures for papers: PNG, SVG or PDF through matplotlib.

A picture is made as wide as its micro-batch numbers need. Where that is wider than a page can bear the
numbers are left out and colours tell the story; the HTML page shows such schedules better.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from math import ceil
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import PolyCollection
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from megatron_disagmoe.drawing.chart import Box, Chart, Row
from megatron_disagmoe.drawing.palette import STYLES, shaded, text_on

# inches
COMPUTE_HEIGHT, PORT_HEIGHT, ROW_GAP, BLOCK_GAP = 0.25, 0.115, 0.03, 0.10
DIGIT_WIDTH = 0.062
NARROWEST, WIDEST, UNLABELLED = 6.5, 40.0, 18.0
RIGHT, TOP, BOTTOM = 0.12, 0.56, 0.48
LEGEND_LINE, LEGEND_ENTRY, LEGEND_DIGIT = 0.18, 0.28, 0.054
LABEL_DIGIT, LABEL_MARGIN = 0.085, 0.34
#: More rows than fit this height are drawn thinner.
TALLEST = 14.0

POINTS_COMPUTE, POINTS_PORT, LEAST_POINTS = 7.0, 4.6, 3.0
#: An SVG of more boxes than this holds them as one embedded image; its text stays text.
MOST_VECTOR_BOXES = 20_000

_SETTINGS: dict[Any, Any] = {
    "font.family": "sans-serif",
    "svg.fonttype": "none",
    "pdf.fonttype": 42,
    "svg.hashsalt": "disagmoe",
}


def write_picture(chart: Chart, path: Path, *, width: float | None = None, dots_per_inch: int = 200) -> None:
    """Draw ``chart`` into ``path`` (PNG, SVG or PDF by suffix).

    Args:
        width: of the time axis in inches; by default as wide as the micro-batch numbers need, within reason.
        dots_per_inch: of a PNG.
    """
    with mpl.rc_context(_SETTINGS):
        figure = _figure(chart, _axis_width(chart) if width is None else width)
        # no date and no version inside: the same chart is the same file
        metadata = {".svg": {"Date": None}, ".pdf": {"CreationDate": None}}.get(path.suffix.lower())
        figure.savefig(path, dpi=dots_per_inch, metadata=metadata)


def _axis_width(chart: Chart) -> float:
    """Inches that let the middle-sized forward box hold its number."""
    forward = [b for row in chart.rows if not row.is_port for b in row.boxes if b.style == "F" and b.end > b.start]
    if not forward or chart.makespan <= 0:
        return NARROWEST
    digits = max(len(str(box.micro_batch)) for box in forward)
    wanted = chart.makespan / median(box.end - box.start for box in forward) * (digits * DIGIT_WIDTH + 0.04)
    return max(NARROWEST, wanted) if wanted <= WIDEST else UNLABELLED


def _figure(chart: Chart, axis_width: float) -> Figure:
    places, height = _places(chart.rows)
    legend_columns, legend_height = _legend_grid(chart, axis_width)
    left = LABEL_MARGIN + LABEL_DIGIT * max((len(row.label) for row in chart.rows if not row.is_port), default=0)
    figure_width, figure_height = left + axis_width + RIGHT, TOP + height + BOTTOM + legend_height
    figure = Figure(figsize=(figure_width, figure_height), facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.add_axes(
        (
            left / figure_width,
            (BOTTOM + legend_height) / figure_height,
            axis_width / figure_width,
            height / figure_height,
        )
    )
    longest = chart.makespan if chart.makespan > 0 else 1.0
    axes.set_xlim(0, longest)
    axes.set_ylim(height, 0)  # the y unit is one inch
    inch = longest / axis_width
    rasterized = sum(len(row.boxes) for row in chart.rows) > MOST_VECTOR_BOXES
    for row, place in zip(chart.rows, places, strict=True):
        _draw_row(axes, row, place, inch, longest=longest, rasterized=rasterized)
    _dress(figure, axes, chart, places, left=left / figure_width)
    _legend(figure, chart, left=left / figure_width, columns=legend_columns)
    return figure


class _Place(NamedTuple):
    """Where a row lies, in inches from the top of the axes, and the size of its text in points."""

    top: float
    bottom: float
    points: float
    label_points: float


def _places(rows: Sequence[Row]) -> tuple[list[_Place], float]:
    """The place of every row and the height of all."""
    gaps = [0.0, *(BLOCK_GAP if row.starts_block(above) else ROW_GAP for above, row in pairwise(rows))]
    heights = [PORT_HEIGHT if row.is_port else COMPUTE_HEIGHT for row in rows]
    scale = min(1.0, TALLEST / max(sum(gaps) + sum(heights), TALLEST))
    places: list[_Place] = []
    y = 0.0
    for row, gap, height in zip(rows, gaps, heights, strict=True):
        points, label_points = (POINTS_PORT, 5.5) if row.is_port else (POINTS_COMPUTE, 8.5)
        top = y + gap * scale
        y = top + height * scale
        places.append(_Place(top, y, points * scale, label_points * scale))
    return places, y


def _draw_row(axes: Axes, row: Row, place: _Place, inch: float, *, longest: float, rasterized: bool) -> None:
    """``inch`` is the time that one inch shows."""
    top, bottom = place.top, place.bottom
    idle = "#f3f3f3" if row.is_port else "#e9e9e9"
    axes.fill([0, longest, longest, 0], [top, top, bottom, bottom], facecolor=idle, edgecolor="none", linewidth=0)
    colours = [shaded(box.style, box.shade) for box in row.boxes]
    corners = [((box.start, top), (box.end, top), (box.end, bottom), (box.start, bottom)) for box in row.boxes]
    # an outline would swallow boxes of a pixel or two
    edges = [0.5 if box.end - box.start > 0.04 * inch else 0.0 for box in row.boxes]
    axes.add_collection(
        PolyCollection(corners, facecolors=colours, edgecolors="white", linewidths=edges, rasterized=rasterized),
        autolim=False,
    )
    numbered = _numbered(row, place.points, inch)
    written = 0.0  # messages to several ranks lie on top of one another; one number will do
    for box, colour in zip(row.boxes, colours, strict=True):
        if (
            box.start >= written
            and box.style in numbered
            and _holds(box, len(str(box.micro_batch)), place.points, inch)
        ):
            axes.text(
                (box.start + box.end) / 2,
                (top + bottom) / 2,
                str(box.micro_batch),
                fontsize=place.points,
                color=text_on(colour),
                ha="center",
                va="center_baseline",
                clip_on=True,
            )
            written = box.end


def _numbered(row: Row, points: float, inch: float) -> set[str]:
    """Styles whose usual box holds the longest number: numbers in some boxes only would mislead."""
    if points < LEAST_POINTS:
        return set()
    boxes: dict[str, list[Box]] = {}
    for box in row.boxes:
        if box.style not in ("waits", "exposed"):
            boxes.setdefault(box.style, []).append(box)
    result = set()
    for style, same in boxes.items():
        usual = sorted(same, key=lambda box: box.end - box.start)[len(same) // 2]
        if _holds(usual, max(len(str(box.micro_batch)) for box in same), points, inch):
            result.add(style)
    return result


def _holds(box: Box, digits: int, points: float, inch: float) -> bool:
    return (box.end - box.start) / inch >= digits * DIGIT_WIDTH * points / POINTS_COMPUTE + 0.015


def _dress(figure: Figure, axes: Axes, chart: Chart, places: Sequence[_Place], *, left: float) -> None:
    """Everything around the boxes: names, axis, title, legend."""
    figure_height = figure.get_size_inches()[1]
    axes.set_yticks([(place.top + place.bottom) / 2 for place in places])
    names = [
        row.label if place.label_points >= LEAST_POINTS else "" for row, place in zip(chart.rows, places, strict=True)
    ]
    axes.set_yticklabels(names)
    for label, row, place in zip(axes.get_yticklabels(), chart.rows, places, strict=True):
        label.set_fontsize(place.label_points)
        label.set_color("#666666" if row.is_port else "#000000")
    axes.tick_params(axis="y", length=0, pad=3)
    axes.tick_params(axis="x", labelsize=7.5, length=3, color="#888888")
    for side in ("top", "left", "right"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color("#888888")
    axes.set_xlabel("time (s)" if chart.unit == "s" else "time (stage times)", fontsize=8)
    figure.text(left, 1 - 0.20 / figure_height, chart.heading, fontsize=9.5, fontweight="bold", va="center")
    figure.text(left, 1 - 0.40 / figure_height, chart.facts, fontsize=8, color="#333333", va="center")


def _legend_grid(chart: Chart, axis_width: float) -> tuple[int, float]:
    """Columns of the legend that fit under the axis, and its height in inches."""
    labels = [style.label for name, style in STYLES.items() if name in chart.styles]
    if not labels:
        return 1, 0.0
    widest = max(LEGEND_ENTRY + LEGEND_DIGIT * len(label) for label in labels)
    all_in_one = sum(LEGEND_ENTRY + LEGEND_DIGIT * len(label) for label in labels) <= axis_width
    columns = len(labels) if all_in_one else max(1, min(len(labels), int(axis_width / widest)))
    return columns, LEGEND_LINE * ceil(len(labels) / columns)


def _legend(figure: Figure, chart: Chart, *, left: float, columns: int) -> None:
    used = chart.styles
    handles = [Patch(facecolor=shaded(name, 0.0), label=style.label) for name, style in STYLES.items() if name in used]
    if handles:
        figure.legend(
            handles=handles,
            loc="lower left",
            bbox_to_anchor=(left, 0.03 / figure.get_size_inches()[1]),
            ncols=columns,
            frameon=False,
            fontsize=7,
            handlelength=1.1,
            handleheight=0.9,
            columnspacing=1.0,
            handletextpad=0.4,
            borderpad=0.2,
            borderaxespad=0,
        )
