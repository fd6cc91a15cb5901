"""``disagmoe bench``: how fast things are. Each benchmark is a module of ``benchmarks``, imported when asked for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from megatron_disagmoe.cli.output import EXIT_DOES_NOT_HOLD, JsonOption, bad_input_exits_2, emit

app = typer.Typer(no_args_is_help=True, add_completion=False, rich_markup_mode=None)

OutOption = Annotated[Path | None, typer.Option(help="Folder for the rows as JSON.", show_default=False)]


@app.callback()
def _bench() -> None:
    """Benchmarks: JSON and a picture each."""


@app.command()
def simulator(out: OutOption = None, as_json: bool = JsonOption) -> None:
    """Actions that the event engine simulates in a second, on one core."""
    with bad_input_exits_2():
        from megatron_disagmoe.benchmarks.simulator import measure

        rows = [row.as_json() for row in measure()]
        result = finish("simulator", rows, out)
    emit(result, as_json=as_json, render=lambda console: _show_simulator(console, rows))
    if not all(row["holds"] for row in rows):
        raise typer.Exit(EXIT_DOES_NOT_HOLD)


def finish(name: str, rows: list[dict[str, Any]], out: Path | None) -> dict[str, Any]:
    """The result to print; with ``out`` also written to ``NAME.json`` there."""
    result: dict[str, Any] = {"rows": rows}
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        path = out / f"{name}.json"
        path.write_text(json.dumps(result, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        result = {**result, "out": str(path)}
    return result


def _show_simulator(console: Console, rows: list[dict[str, Any]]) -> None:
    table = Table(title="Actions per second, one core")
    for name in ("groups", "layers", "micro-batches", "lanes", "actions", "simulated", "with reading"):
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(
            str(row["groups"]),
            str(row["layers"]),
            str(row["micro_batches"]),
            "yes" if row["lanes"] else "no",
            f"{row['compute_actions'] + row['transfers']:,}",
            f"{row['actions_per_second']:,.0f}",
            f"{row['actions_per_second_with_reading']:,.0f}",
        )
    console.print(table)
