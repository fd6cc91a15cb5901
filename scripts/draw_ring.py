"""Draw docs/images/ring.png: who holds what in an AF-pipe of two groups a side, and what travels between them.

    .venv/bin/python scripts/draw_ring.py [OUT.png]
"""

from __future__ import annotations

import sys
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle

ATTENTION, EXPERTS, LANE, INK = "#1f6feb", "#d1570a", "#6e7781", "#24292f"
WIDTH, HEIGHT = 3.5, 1.75
#: Group -> centre, label, what it holds, its number of ranks. Four MoE layers, p = 2: group g holds layers g and g + 2.
GROUPS = {
    "A0": ((0.0, 3.4), ("embedding, output layer, loss", "attention, norms, router,", "shared experts of 0, 2"), 2),
    "F0": ((6.4, 3.4), ("routed experts", "of layers 0, 2"), 3),
    "A1": ((6.4, 0.0), ("attention, norms, router,", "shared experts of 1, 3"), 2),
    "F1": ((0.0, 0.0), ("routed experts", "of layers 1, 3"), 3),
}


def draw(out: Path) -> None:
    """Write the picture to ``out``."""
    figure = Figure(figsize=(9.2, 5.2))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_xlim(-2.3, 8.7)
    axes.set_ylim(-2.05, 4.75)
    axes.set_aspect("equal")
    axes.axis("off")
    for name, (centre, lines, num_ranks) in GROUPS.items():
        _group(axes, name, centre=centre, lines=lines, num_ranks=num_ranks)
    half_width, half_height = WIDTH / 2 + 0.08, HEIGHT / 2 + 0.08
    (left, top), (right, bottom) = GROUPS["A0"][0], GROUPS["A1"][0]
    middle_x, middle_y = (left + right) / 2, (top + bottom) / 2
    _arrow(axes, (left + half_width, top), (right - half_width, top), "M2N: dispatch", (middle_x, top + 0.24))
    _arrow(axes, (right, top - half_height), (right, bottom + half_height), "N2M: combine", (right + 1.0, middle_y))
    _arrow(axes, (right - half_width, bottom), (left + half_width, bottom), "M2N", (middle_x, bottom + 0.24))
    _arrow(axes, (left, bottom + half_height), (left, top - half_height), "N2M", (left - 0.5, middle_y))
    for begin, end in (((left, top), (right, bottom)), ((right, bottom), (left, top))):
        sign = 1 if begin[0] < end[0] else -1
        start = (begin[0] + sign * half_width, begin[1] - sign * (half_height - 0.35))
        stop = (end[0] - sign * half_width, end[1] + sign * (half_height - 0.35))
        _arrow(axes, start, stop, "", (0, 0), color=LANE, style=(0, (4, 3)), bend=-0.12)
    axes.text(middle_x, middle_y, "lane: residual and routing,\noff the critical path", ha="center", va="center",
              fontsize=10, color=LANE, bbox={"facecolor": "white", "edgecolor": "none", "pad": 2})  # fmt: skip
    axes.text(middle_x, -1.55, "Forward runs this way round, backward the other way with gradients. "
              "While one micro-batch is with\nthe experts, attention works on another: every transfer is a pipeline "
              "stage of its own.", ha="center", va="center", fontsize=10, color=INK)  # fmt: skip
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=130, facecolor="white", metadata={"Software": None})


def _group(axes: Axes, name: str, *, centre: tuple[float, float], lines: tuple[str, ...], num_ranks: int) -> None:
    color = ATTENTION if name.startswith("A") else EXPERTS
    x, y = centre
    axes.add_patch(
        FancyBboxPatch(
            (x - WIDTH / 2, y - HEIGHT / 2), WIDTH, HEIGHT,
            boxstyle="round,pad=0,rounding_size=0.15", facecolor=f"{color}18", edgecolor=color, linewidth=1.8,
        )
    )  # fmt: skip
    axes.text(x - WIDTH / 2 + 0.15, y + 0.5, name, ha="left", va="center", fontsize=15, weight="bold", color=color)
    size, gap = 0.3, 0.1
    begin = x + WIDTH / 2 - 0.15 - num_ranks * (size + gap) + gap
    for rank in range(num_ranks):
        axes.add_patch(Rectangle((begin + rank * (size + gap), y + 0.36), size, size, facecolor=color, alpha=0.85))
    word = "M" if name.startswith("A") else "N"
    axes.text(begin - 0.12, y + 0.5, f"{word} ranks", ha="right", va="center", fontsize=9, color=color)
    for number, line in enumerate(lines):
        axes.text(x, y + 0.02 - 0.3 * number, line, ha="center", va="center", fontsize=10, color=INK)


def _arrow(
    axes: Axes,
    begin: tuple[float, float],
    end: tuple[float, float],
    label: str,
    label_at: tuple[float, float],
    *,
    color: str = INK,
    style: str | tuple[int, tuple[int, int]] = "solid",
    bend: float = 0.0,
) -> None:
    axes.add_patch(
        FancyArrowPatch(
            begin, end, arrowstyle="-|>", mutation_scale=16, linewidth=1.6, color=color, linestyle=style,
            connectionstyle=f"arc3,rad={bend}", shrinkA=0, shrinkB=0,
        )
    )  # fmt: skip
    if label:
        axes.text(*label_at, label, ha="center", va="center", fontsize=10, color=color)


if __name__ == "__main__":
    here = Path(__file__).resolve().parents[1]
    draw(Path(sys.argv[1]) if len(sys.argv) > 1 else here / "docs" / "images" / "ring.png")
