"""The picture of ``disagmoe bench transport``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

#: By back end; Okabe and Ito's colours.
_COLOURS = {"torch": "#0072b2", "nixl": "#d55e00", "gloo-p2p": "#757575", "gloo-all-to-all": "#b3b3b3"}
#: By dispatch mode.
_HATCHES = {"per-expert": "", "per-rank": "//", "per-node": "..", None: ""}
_MODE_COLOURS = {"per-expert": "#0072b2", "per-rank": "#009e73", "per-node": "#e69f00"}

Row = dict[str, Any]


def draw(rows: Sequence[Row], out: Path) -> None:
    """Share of each limited link, Gbit/s without a limit, and bytes a micro-batch, into ``out`` (PNG, SVG or PDF)."""
    links = sorted({row["link_gbit_per_s"] for row in rows if row["link_gbit_per_s"] is not None})
    unlimited = [row for row in rows if row["link_gbit_per_s"] is None]
    panels = len(links) + bool(unlimited) + 1
    figure = Figure(figsize=(11, 3.1 * panels), layout="constrained")
    axes = iter(figure.subplots(panels, 1, squeeze=False)[:, 0])
    for link in links:
        axis = next(axes)
        here = [row for row in rows if row["link_gbit_per_s"] == link]
        _draw_rates(axis, here, ("forward_fraction", "reverse_fraction"))
        axis.axhline(0.9, color="black", linewidth=0.8, linestyle="--")
        axis.set_ylim(0, 1.02)
        axis.set_ylabel("share of the link")
        axis.set_title(f"Two hosts, {link:g} Gbit/s each way, both directions busy (left bar: A to F, right: F to A)")
    if unlimited:
        axis = next(axes)
        _draw_rates(axis, unlimited, ("forward_gbit_per_s", "reverse_gbit_per_s"))
        axis.set_ylabel("Gbit/s of payload")
        axis.set_title("One machine, no limit")
    _draw_bytes(next(axes), rows)
    figure.savefig(out, dpi=130)


def _sizes(rows: Sequence[Row]) -> list[tuple[int, int]]:
    return list(dict.fromkeys((row["attention_ranks"], row["ffn_ranks"]) for row in rows))


def _draw_rates(axis: Axes, rows: Sequence[Row], columns: tuple[str, str]) -> None:
    """A pair of bars for each stream, grouped by M x N."""
    sizes = _sizes(rows)
    streams = list(dict.fromkeys((row["transport"], row["dispatch"]) for row in rows))
    width = 0.9 / (2 * len(streams))
    for number, (transport, dispatch) in enumerate(streams):
        for way, column in enumerate(columns):
            found = {
                (row["attention_ranks"], row["ffn_ranks"]): row[column]
                for row in rows
                if (row["transport"], row["dispatch"]) == (transport, dispatch)
            }
            axis.bar(
                [group - 0.45 + (2 * number + way + 0.5) * width for group in range(len(sizes))],
                [found.get(size, 0.0) for size in sizes],
                width * 0.92,
                color=_COLOURS[transport],
                hatch=_HATCHES[dispatch],
                edgecolor="white",
                linewidth=0.4,
                label=None if way else " ".join(part for part in (transport, dispatch) if part),
            )
    axis.set_xticks(range(len(sizes)), [f"{m} x {n}" for m, n in sizes])
    axis.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1.0, 1.0))


def _draw_bytes(axis: Axes, rows: Sequence[Row]) -> None:
    """Bytes from attention to FFN ranks a micro-batch, by mode: the same for every back end and link."""
    sizes = _sizes(rows)
    for number, (mode, colour) in enumerate(_MODE_COLOURS.items()):
        found = {(row["attention_ranks"], row["ffn_ranks"]): row for row in rows if row["dispatch"] == mode}
        places = [group - 0.3 + number * 0.3 for group in range(len(sizes))]
        heights = [found[size]["forward_bytes"] / 2**20 if size in found else 0.0 for size in sizes]
        bars = axis.bar(places, heights, 0.28, color=colour, label=mode)
        texts = [f"{found[size]['fewer_rows']:.2f}x" if size in found else "" for size in sizes]
        axis.bar_label(bars, texts, fontsize=7)
    axis.set_xticks(range(len(sizes)), [f"{m} x {n}" for m, n in sizes])
    axis.set_ylabel("MiB from A to F")
    axis.set_title("Payload of a micro-batch; above: times fewer hidden-state rows than per-expert")
    axis.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1.0, 1.0))
