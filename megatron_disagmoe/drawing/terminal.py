"""A chart in the terminal: one line per group, one character per slice of time.

Every box starts with its micro-batch number where that fits and goes on with a mark of its kind, so the view
reads the same without colours::

    A0   0>>1>>2>>3>>0<<<<<1<<<<<
"""

from __future__ import annotations

from collections.abc import Sequence, Set

from rich.console import Console
from rich.style import Style as RichStyle
from rich.text import Text

from megatron_disagmoe.drawing.chart import Box, Chart, Row
from megatron_disagmoe.drawing.palette import STYLES, hexadecimal, shaded, text_on

#: What fills a box behind its number.
MARKS = {
    "F": ">",
    "B": "<",
    "I": "(",
    "W": "w",
    "M2N": "\u2193",
    "dM2N": "\u2191",
    "N2M": "\u2191",
    "dN2M": "\u2193",
    "LANE": "\u2192",
    "dLANE": "\u2190",
    "AGAIN": "\u2193",
    "waits": ".",
    "exposed": "!",
}
NARROWEST = 20


def print_chart(chart: Chart, console: Console, *, ports: bool = True) -> None:
    """Print ``chart`` as wide as ``console``; ``ports`` False leaves out what groups send.

    Raises:
        ValueError: where the console has no room for a drawing.
    """
    rows = [row for row in chart.rows if ports or not row.is_port]
    margin = max((len(row.label) for row in rows), default=0) + 1
    width = console.width - margin
    if width < NARROWEST:
        raise ValueError(f"a terminal of {console.width} columns is too narrow to draw in: {margin + NARROWEST} needed")
    console.print(Text(chart.heading, style="bold"), Text(chart.facts), sep="\n")
    for index, row in enumerate(rows):
        if index and row.starts_block(rows[index - 1]):
            console.print()
        line = Text(row.label.ljust(margin), style="dim" if row.is_port else "bold", no_wrap=True)
        console.print(line.append_text(_line(row, chart.makespan, width)))
    console.print(_legend({box.style for row in rows for box in row.boxes}), soft_wrap=True)


def _line(row: Row, makespan: float, width: int) -> Text:
    """``width`` characters; each shows the box that fills most of its slice of time, if any fills half."""
    cells = _cells(row.boxes, makespan, width)
    text = Text(no_wrap=True)
    start = 0
    while start < width:
        end = start + 1
        while end < width and cells[end] is cells[start]:
            end += 1
        text.append_text(_piece(cells[start], end - start))
        start = end
    return text


def _piece(box: Box | None, length: int) -> Text:
    if box is None:
        return Text(" " * length)
    number = "" if box.style in ("waits", "exposed") else str(box.micro_batch)
    if len(number) > length or (len(number) == length and length > 2):
        number = ""
    colour = shaded(box.style, box.shade)
    style = RichStyle(color=text_on(colour), bgcolor=hexadecimal(colour))
    return Text(number + MARKS[box.style] * (length - len(number)), style=style)


def _cells(boxes: Sequence[Box], makespan: float, width: int) -> list[Box | None]:
    """For each slice of time the box that covers most of it; None where less than half is covered by one."""
    cells: list[Box | None] = [None] * width
    if makespan <= 0:
        return cells
    covered = [0.5] * width
    scale = width / makespan
    for box in boxes:
        left, right = box.start * scale, box.end * scale
        for cell in range(max(0, int(left)), min(width, int(right) + 1)):
            share = min(right, cell + 1) - max(left, cell)
            if share >= covered[cell] and (cells[cell] is None or share > covered[cell]):
                covered[cell], cells[cell] = share, box
    return cells


def _legend(used: Set[str]) -> Text:
    text = Text()
    for name, style in STYLES.items():
        if name in used:
            colour = shaded(name, 0.0)
            text.append(f" {MARKS[name]} ", style=RichStyle(color=text_on(colour), bgcolor=hexadecimal(colour)))
            text.append(f" {style.label}  ")
    return text
