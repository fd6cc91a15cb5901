"""Step time against live activations as a picture: one panel for either side's groups, one curve for each lever."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

#: Okabe and Ito's colours, and marks that tell curves apart in grey.
_CURVES = (("#000000", "o"), ("#e69f00", "s"), ("#009e73", "^"), ("#0072b2", "D"), ("#d55e00", "v"))
#: Where an axis has ticks, in every decade.
_TICKS = (1, 1.5, 2, 3, 4, 6, 8)
_SETTINGS: dict[Any, Any] = {"svg.fonttype": "none", "pdf.fonttype": 42, "svg.hashsalt": "disagmoe"}


class Measured(Protocol):
    """One point of the frontier (see ``builders.frontier.Point``)."""

    @property
    def lever(self) -> str: ...
    @property
    def max_live(self) -> int: ...
    @property
    def makespan(self) -> float: ...
    @property
    def bound(self) -> float: ...
    @property
    def live_attention(self) -> int: ...
    @property
    def live_ffn(self) -> int: ...


def draw_frontier(points: Sequence[Measured], path: str | Path, *, heading: str) -> None:
    """Draw ``points`` into ``path`` (PNG, SVG or PDF by suffix).

    Raises:
        ValueError: for another suffix, or no points.
    """
    path = Path(path)
    if path.suffix.lower() not in (".png", ".svg", ".pdf"):
        raise ValueError(f"cannot draw {path.name}: its suffix should be one of .png, .svg, .pdf")
    if not points:
        raise ValueError("a frontier needs at least one point")
    with mpl.rc_context(_SETTINGS):
        figure = Figure(figsize=(9.0, 4.2), layout="constrained")
        left, right = figure.subplots(1, 2, sharey=True)
        for axes, side in ((left, "attention"), (right, "ffn")):
            _panel(axes, points, side)
        left.set_ylabel("step time")
        left.set_title("attention groups", fontsize=10)
        right.set_title("FFN groups", fontsize=10)
        figure.suptitle(heading, fontsize=11)
        figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=5, fontsize=9)
        metadata = {".svg": {"Date": None}, ".pdf": {"CreationDate": None}}.get(path.suffix.lower())
        figure.savefig(path, dpi=160, metadata=metadata)


def _panel(axes: Axes, points: Sequence[Measured], side: str) -> None:
    for number, lever in enumerate(dict.fromkeys(point.lever for point in points)):
        colour, mark = _CURVES[number % len(_CURVES)]
        mine = [point for point in points if point.lever == lever]
        live = [getattr(point, f"live_{side}") for point in mine]
        axes.plot(live, [point.makespan for point in mine], color=colour, marker=mark, markersize=4, label=lever)
        if number == 0:
            caps = [point.max_live for point in mine]
            axes.plot(caps, [point.bound for point in mine], color=colour, linestyle=":", label=f"{lever}: lower bound")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    for axis in (axes.xaxis, axes.yaxis):  # both may span less than a factor of two
        axis.set_major_locator(LogLocator(base=10, subs=_TICKS, numticks=12))
        axis.set_minor_locator(NullLocator())
        axis.set_major_formatter("{x:g}")
    axes.set_xlabel("activations alive at once, at most")
    axes.grid(visible=True, alpha=0.3)
