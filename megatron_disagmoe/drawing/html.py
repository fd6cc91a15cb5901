"""One self-contained HTML page with zoom and hover: no network, no library, one canvas per chart.

The page's own code lies beside this file (``viewer.*``); charts go in as JSON columns. Several charts share
the page (measured above predicted) and, where their units agree, one time axis.
"""

from __future__ import annotations

import html
import json
from collections.abc import Sequence
from importlib import resources
from pathlib import Path

from megatron_disagmoe.drawing.chart import Chart, Row
from megatron_disagmoe.drawing.palette import LIGHTEST, STYLES


def write_html(charts: Sequence[Chart], path: str | Path, *, title: str = "Schedule") -> None:
    """Write one page that shows ``charts`` one above the other.

    Args:
        charts: at least one.
        title: of the page.

    Raises:
        ValueError: for no chart at all.
    """
    if not charts:
        raise ValueError("a page needs at least one chart")
    Path(path).write_text(page(charts, title=title), encoding="utf-8")


def page(charts: Sequence[Chart], *, title: str) -> str:
    """The page's text."""
    data = {
        "styles": {name: {"label": style.label, "colour": style.colour} for name, style in STYLES.items()},
        "lightest": LIGHTEST,
        "charts": [_chart(chart) for chart in charts],
    }
    viewer = resources.files(__package__)
    parts = {
        "@TITLE@": html.escape(title),
        "@STYLE@": (viewer / "viewer.css").read_text(encoding="utf-8"),
        # "</" must not end the script element early, whatever a heading says
        "@DATA@": json.dumps(data, allow_nan=False, separators=(",", ":")).replace("</", "<\\/"),
        "@SCRIPT@": (viewer / "viewer.js").read_text(encoding="utf-8"),
    }
    text = (viewer / "viewer.html").read_text(encoding="utf-8")
    for mark, part in parts.items():
        before, found, after = text.partition(mark)
        assert found, f"viewer.html lacks {mark}"
        text = before + part + after
    return text


def _chart(chart: Chart) -> dict[str, object]:
    names: dict[str, int] = {}
    rows = [_row(row, names) for row in chart.rows]
    return {
        "heading": chart.heading,
        "facts": chart.facts,
        "unit": chart.unit,
        "makespan": chart.makespan,
        "names": list(names),
        "rows": rows,
    }


def _row(row: Row, names: dict[str, int]) -> dict[str, object]:
    """Columns, one entry a box; ``names`` numbers the texts."""
    return {
        "label": row.label,
        "port": row.is_port,
        "side": row.side.value,
        "leads": row.leads,
        "busy": row.busy(),
        "start": [_short(box.start) for box in row.boxes],
        "end": [_short(box.end) for box in row.boxes],
        "style": [box.style for box in row.boxes],
        "shade": [round(box.shade, 3) for box in row.boxes],
        "what": [names.setdefault(box.what, len(names)) for box in row.boxes],
        "microBatch": [box.micro_batch for box in row.boxes],
    }


def _short(value: float) -> float:
    """Nine decimals are nanoseconds where the unit is seconds; more digits would only fill the page."""
    return round(value, 9)
