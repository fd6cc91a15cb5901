"""Files of a reproduction: rows and numbers as JSON, a table as Markdown, pictures as PNG and SVG."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure as Picture

from megatron_disagmoe.reproduction.figures.base import Figure, Outcome
from megatron_disagmoe.reproduction.lab import Lab
from megatron_disagmoe.reproduction.rows import Row, tally


def reproduce(figures: Sequence[Figure], lab: Lab) -> dict[str, Outcome]:
    """Run everything that ``figures`` need, and make them."""
    lab.run([cell for figure in figures for cell in figure.cells()])
    return {figure.name: figure.make(lab) for figure in figures}


def write(figures: Sequence[Figure], outcomes: dict[str, Outcome], out: Path) -> list[str]:
    """Everything into ``out``; the paths."""
    out.mkdir(parents=True, exist_ok=True)
    rows = [row for outcome in outcomes.values() for row in outcome.rows]
    written = [out / "rows.json", out / "table.md"]
    content = {"rows": [row.as_json() for row in rows], "tally": vars(tally(rows))}
    written[0].write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    written[1].write_text(table(rows), encoding="utf-8")
    for figure in figures:
        outcome = outcomes[figure.name]
        numbers = out / f"{figure.name}.json"
        numbers.write_text(json.dumps(outcome.data, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        written.append(numbers)
        written += draw(outcome, figure.title, out / figure.name)
    return [str(path) for path in written]


def draw(outcome: Outcome, title: str, stem: Path) -> list[Path]:
    """The picture as PNG and SVG."""
    picture = Picture(figsize=(6, 3.6), layout="constrained")
    outcome.draw(picture)
    picture.suptitle(title, fontsize=10)
    paths = [stem.with_suffix(f".{kind}") for kind in ("png", "svg")]
    for path in paths:
        picture.savefig(path, dpi=150)
    return paths


def table(rows: Iterable[Row]) -> str:
    """Rows as Markdown."""
    lines = [
        "| figure | quantity | paper | ours | error | tolerance | holds | why |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        verdict = ("yes" if row.holds else "**no**") + (" (calibration)" if row.calibration else "")
        lines.append(
            f"| {row.figure} | {row.quantity} | {row.paper:.3g} | {row.ours:.3g} | {row.relative_error:+.1%} "
            f"| {row.tolerance:.0%} | {verdict} | {row.why} |"
        )
    return "\n".join(lines) + "\n"


def as_json(outcomes: dict[str, Outcome], written: Sequence[str]) -> dict[str, Any]:
    """What ``disagmoe reproduce --json`` prints."""
    rows = [row for outcome in outcomes.values() for row in outcome.rows]
    counted = tally(rows)
    return {
        "rows": [row.as_json() for row in rows],
        "predictions": counted.predictions,
        "held": counted.held,
        "share_held": counted.share,
        "calibration_rows": counted.calibration,
        "calibration_held": counted.calibration_held,
        "files": list(written),
    }
